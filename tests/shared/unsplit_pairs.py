"""Graphs with pairs on a CPU, where their products are those of CUDA for numbers of rows that are not split."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch.fx import GraphModule, Interpreter

from normquant.ops import Op
from normquant.ops._op import Launcher


class UnsplitPairs(Interpreter):
    """Runs a graph, and its pairs by the ops that they call on CUDA. otherwise: of each pair that was run."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.otherwise: list[str] = []

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if not str(target).startswith("normquant.block_fp8_linear_"):
            return super().call_function(target, args, kwargs)
        self.otherwise.append(args[6])
        with (  # neither is for tensors on a CPU
            mock.patch("normquant.linear.pairs.launch_of", lambda overload: overload),
            mock.patch.object(Op, "launch", dispatched),
        ):
            return target.launch(*args)


def dispatched(op: Op, *like: Any) -> Launcher:
    """What calls an op through torch, on the tensors of arguments like these."""
    places = [at for at, arg in enumerate(like) if isinstance(arg, torch.Tensor)]

    def run(*tensors: torch.Tensor) -> list[torch.Tensor]:
        given = list(like)
        for at, tensor in zip(places, tensors, strict=True):
            given[at] = tensor
        outputs = op.overload(*given)
        return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)

    return run
