"""How the axes of a quantization lie in the dimensions of a tensor.

A quantized activation has rows m, groups g in a row and lanes l in a group. A `Form` says which of them each dimension
of a tensor runs over, outermost first: a norm [M, K] is ((m,), (g, l)), its view [M, G, 128] is ((m,), (g,), (l,)), a
transposed scale [G, M] is ((g,), (m,)). Views, permutes and reductions move forms around; where a step cannot be
followed the result is None, and the graph is not understood. Rows may be symbolic, so no step asks for their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from math import prod
from typing import Any

from torch.fx import Node

from normquant.compile.find.graph import (
    PERMUTES,
    RESHAPES,
    SAME_VALUES,
    UNIT_DIMS,
    arguments,
    aten,
    is_call,
    is_cast,
    value,
)


@dataclass(frozen=True)
class Axis:
    """name: "m", "g", "l", or "*" where a size-1 dimension was expanded. size: None for rows.
    part: (i, n) for the i-th of n pieces, outermost first, where dimensions cut an axis."""

    name: str
    size: int | None
    part: tuple[int, int] = (0, 1)


Dim = tuple[Axis, ...]
Form = tuple[Dim, ...]
ROWS = Axis("m", None)


@dataclass(frozen=True)
class Axes:
    """The axes of one quantization: [rows, k] in groups of `group`; single_row when there is exactly one row.

    cuts: where, counted in values from the end of a row, some shape has a border between dimensions; ascending.
    """

    k: int
    group: int
    single_row: bool
    cuts: tuple[int, ...]

    def data(self) -> Dim:
        """The axes of the activation, in memory order; those of size 1 are left out everywhere."""
        return self.scale() + self.lanes()

    def scale(self) -> Dim:
        """The axes of the scales, [rows, k / group]."""
        return (() if self.single_row else (ROWS,)) + _pieces(
            "g", [c // self.group for c in self.cuts if c >= self.group]
        )

    def lanes(self) -> Dim:
        """The axes inside a group."""
        return _pieces("l", [1, *(c for c in self.cuts if c <= self.group)])

    def of_shape(self, shape: Sequence[Any]) -> Form | None:
        """The form of the activation when it has this shape."""
        return distribute(self.data(), shape)


def _pieces(name: str, cuts: Sequence[int]) -> Dim:
    """An axis cut at some places, outermost piece first."""
    cuts = sorted(set(cuts))
    sizes = [b // a for a, b in pairwise(cuts)][::-1]
    return tuple(Axis(name, size, (i, len(sizes))) for i, size in enumerate(sizes))


def order(form: Form) -> list[str] | None:
    """The names of the axes in order, each once: ["g", "m"] of transposed scales; None where an axis is in pieces that
    lie in another order, or with another axis in between."""
    found: list[str] = []
    for name, run in groupby(flatten(form), key=lambda axis: axis.name):
        parts = [axis.part for axis in run]
        if name in found or parts != [(i, len(parts)) for i in range(len(parts))]:
            return None
        found.append(name)
    return found


def flatten(form: Form) -> Dim:
    """All axes in order; the parts of the rows put together again."""
    axes: list[Axis] = []
    for is_rows, run in groupby((axis for dim in form for axis in dim), key=lambda axis: axis.name == "m"):
        parts = list(run)
        whole = is_rows and [axis.part for axis in parts] == [(i, len(parts)) for i in range(len(parts))]
        axes.extend([ROWS] if whole else parts)
    return tuple(axes)


def distribute(axes: Dim, shape: Sequence[Any]) -> Form | None:
    """Lay axes, in order, over the dimensions of a shape of as many elements."""
    if sum(axis.name == "m" for axis in axes) > 1:
        return None  # parts of the rows with something in between
    at = next((i for i, axis in enumerate(axes) if axis.name == "m"), len(axes))
    before, after = list(axes[:at]), list(axes[at:])
    head = _consume(before, shape)
    tail = [] if at == len(axes) else _consume(after[:0:-1], shape[len(head) :][::-1])
    middle = shape[len(head) : len(shape) - len(tail)]
    used = sum(map(len, head)), sum(map(len, tail))
    left = before[used[0] :] + after[: len(after) - used[1]]
    body = _middle(tuple(left), middle)
    return None if body is None else (*head, *body, *(dim[::-1] for dim in reversed(tail)))


def _consume(axes: list[Axis], shape: Sequence[Any]) -> list[Dim]:
    """Dimensions, from the first on, that are made of whole axes, from the first on."""
    dims: list[Dim] = []
    axes = list(axes)
    for size in shape:
        taken = 0
        if not isinstance(size, int):
            break
        while taken < len(axes) and prod(axis.size or 0 for axis in axes[:taken]) < size:
            taken += 1
        if prod(axis.size or 0 for axis in axes[:taken]) != size:
            break
        dims.append(tuple(axes[:taken]))
        axes = axes[taken:]
    return dims


def _middle(axes: Dim, shape: Sequence[Any]) -> Form | None:
    """The dimensions that hold the rows: one that may hold more, or several that hold nothing else."""
    wide = [i for i, size in enumerate(shape) if not (isinstance(size, int) and size == 1)]
    if not axes:
        return None if wide else tuple(() for _ in shape)
    if len(wide) == 1:
        return tuple(axes if i in wide else () for i in range(len(shape)))
    if axes != (ROWS,) or not wide:
        return None
    parts = {i: (Axis("m", None, (n, len(wide))),) for n, i in enumerate(wide)}
    return tuple(parts.get(i, ()) for i in range(len(shape)))


def without(form: Form, name: str) -> Form:
    return tuple(tuple(axis for axis in dim if axis.name != name) for dim in form)


def permuted(node: Node, form: Form) -> Form:
    if is_call(node, aten.t.default):
        return form[::-1]
    if is_call(node, aten.permute.default):
        order: Any = arguments(node)[1]
        return tuple(form[d] for d in order)
    dims = list(form)
    a, b = arguments(node)[1], arguments(node)[2]
    dims[a], dims[b] = dims[b], dims[a]
    return tuple(dims)


def expanded(form: Form, shape: Sequence[Any]) -> Form | None:
    """The form after `aten.expand` to shape."""
    form = ((),) * (len(shape) - len(form)) + form
    dims: list[Dim] = []
    for dim, size in zip(form, shape, strict=True):
        if not dim and not isinstance(size, int):
            return None
        dims.append((Axis("*", size),) if not dim and size != 1 else dim)
    return tuple(dims)


def through(node: Node, form: Form) -> Form | None:
    """The form of a view, a cast or an expand of a tensor that has `form`; None for any other operation."""
    if is_call(node, *PERMUTES):
        return permuted(node, form)
    if is_call(node, aten.expand.default):
        return expanded(form, value(node).shape)
    if is_call(node, *SAME_VALUES) or is_cast(node):
        return form
    if is_call(node, *RESHAPES, *UNIT_DIMS):
        return distribute(flatten(form), value(node).shape)
    return None


def scales_groups(scale: Form, data: Form) -> bool:
    """Whether, broadcast against each other, every value of data meets the scale of its own group."""
    if len(scale) > len(data):
        return False
    scale = ((),) * (len(data) - len(scale)) + scale
    for s, d in zip(scale, data, strict=True):
        lanes = [axis.size or 1 for axis in d if axis.name == "l"]
        rest = tuple(axis for axis in d if axis.name != "l")
        if s != rest and (not lanes or s != (*rest, Axis("*", prod(lanes)))):
            return False
    return True
