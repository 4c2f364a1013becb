"""Whether an op accepts what a fusion would give it: the op is asked, with fake tensors, before anything is built."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch.fx import Node

from normquant.compile.find.graph import Unsupported, aten, rows_are_even, value
from normquant.ops import OPS


def check_op(op: str, *args: Any) -> None:
    """Raise Unsupported, with the op's own words, where it does not accept the arguments; the spec is the last one."""
    try:
        OPS[op].check(*args)
    except ValueError as error:
        raise Unsupported(f"{op} does not accept this: {error}") from None


def rows_of(node: Node, k: int) -> torch.Tensor:
    """What `as_rows` makes of a node, [..., K] as [M, K]. Raises Unsupported where that would take a copy."""
    x = value(node)
    if x.dim() == 2 and x.shape[1] == k:
        return x
    if not rows_are_even(x, k):
        raise Unsupported(
            f"{node.name} has shape {tuple(x.shape)} and stride {x.stride()}; its rows are not evenly spaced"
        )
    return _computed(aten.reshape.default, x, [-1, k])


def row_of(weight: Node, k: int) -> torch.Tensor:
    """What `as_row` makes of a weight, [K]."""
    w = value(weight)
    return w if w.dim() == 1 else _computed(aten.reshape.default, w, [k])


def sines_of(cache: Node, r: int) -> torch.Tensor:
    """The second half of cos and sin, [positions, R/2]."""
    return _computed(aten.slice.Tensor, value(cache), 1, r // 2, r)


def _computed(target: Any, x: torch.Tensor, *args: Any) -> torch.Tensor:
    with getattr(x, "fake_mode", None) or nullcontext():
        return target(x, *args)
