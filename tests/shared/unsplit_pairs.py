"""Graphs with pairs on a CPU, where their products are those of CUDA for numbers of rows that are not split."""

from __future__ import annotations

from typing import Any
from unittest import mock

from torch.fx import GraphModule, Interpreter


class UnsplitPairs(Interpreter):
    """Runs a graph, and its pairs by the ops that they call on CUDA. otherwise: of each pair that was run."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.otherwise: list[str] = []

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if not str(target).startswith("normquant.block_fp8_linear_"):
            return super().call_function(target, args, kwargs)
        self.otherwise.append(args[6])
        with mock.patch("normquant.linear.pairs.launch_of", lambda overload: overload):  # not for tensors on a CPU
            return target.launch(*args)
