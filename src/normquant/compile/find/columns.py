"""Slices and splits of a tensor's last dimension: which columns of which tensor a node holds."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch.fx import Node

from normquant.compile.find.graph import arguments, aten, first_arg, is_call, value


@dataclass(frozen=True)
class Columns:
    """`width` columns of `base`, from `start` on."""

    base: Node
    start: int
    width: int

    @property
    def end(self) -> int:
        return self.start + self.width


def columns(node: Node) -> Columns | None:
    """The columns that a node holds of the tensor that it is sliced from, through slices of slices.

    None for a node that is no such slice, or whose width is symbolic.
    """
    found = part(node)
    if found is None:
        return None
    (base, start), width = found, value(node).shape[-1]
    if not isinstance(width, int):
        return None
    outer = columns(base)
    return Columns(base, start, width) if outer is None else Columns(outer.base, outer.start + start, width)


def part(node: Node) -> tuple[Node, int] | None:
    """What a node is a slice of along the last dimension, and where it starts; None where it is none."""
    if is_call(node, operator.getitem):
        split, index = arguments(node)
        if is_call(split, aten.split.Tensor, aten.split_with_sizes.default) and _is_last(split, 2):
            sizes = arguments(split)[1]
            before = [sizes] * index if isinstance(sizes, int) else sizes[:index]
            return (first_arg(split), sum(before)) if all(isinstance(size, int) for size in before) else None
    if is_call(node, aten.slice.Tensor) and _is_last(node, 1) and len(arguments(node)) < 5:
        start = arguments(node)[2] if len(arguments(node)) > 2 else 0
        return (first_arg(node), start) if isinstance(start, int) and start >= 0 else None
    return None


def _is_last(node: Node, at: int) -> bool:
    """Whether the argument `at`, a dimension, is the last one of the tensor that a node reads."""
    dim = arguments(node)[at] if len(arguments(node)) > at else 0
    dims = value(first_arg(node)).dim()
    return isinstance(dim, int) and dim % dims == dims - 1
