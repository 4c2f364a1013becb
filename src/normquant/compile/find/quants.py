"""A group quantization written in aten operations, recognised from the fp8 cast backwards.

    amax  = max |y| over a group, at least `floor`
    s     = amax / 448, at least `scale_floor`, rounded up to a power of two for ue8m0
    data  = fp8(clamp(y / s, -448, 448))

Each constant and each spelling of the divisions is read off the graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch.fx import Node

from normquant.compile.find.axes import Axes, Form, flatten, order, scales_groups, through, without
from normquant.compile.find.duplicates import Values
from normquant.compile.find.graph import (
    NotFound,
    Unsupported,
    arguments,
    aten,
    dtype,
    factors,
    first_arg,
    is_call,
    is_expand,
    is_tensor,
    is_view,
    is_widening,
    number,
    op_name,
    peel,
    value,
)
from normquant.compile.find.scale_arithmetic import (
    ABSOLUTE,
    Scale,
    bounds_of,
    check_log2,
    read_scale,
    reduction,
)
from normquant.spec import FP8_MAX, GROUPS, Divide, QuantSpec


@dataclass(frozen=True)
class Quant:
    """One group quantization of a graph.

    y: what is quantized, after views and widening casts are taken off.
    data, scale: the nodes that make the fp8 values, in the order of [M, K], and the scales; None when never read.
    scale_form: how the scale's axes lie; None when the scale is an opaque op's output, to be replaced as it is.
    spec: all but rounding and sum, which belong to the norm, and layout, which depends on who reads the scales.
    inner: the nodes between y and the two results.
    """

    y: Node
    data: Node | None
    scale: Node | None
    scale_form: Form | None
    axes: Axes
    spec: QuantSpec
    inner: frozenset[Node]


@dataclass(frozen=True)
class Arithmetic:
    """A quantization in aten operations whose K is not known yet. reduced: what its amax is taken of, y or the same
    value computed again."""

    cast: Node
    quotient: Node
    dividend: Node
    scale_use: Node
    scale: Node
    facts: Scale
    divide: Divide
    y: Node
    reduced: Node
    group: int


def read_arithmetic(cast: Node, values: Values) -> Arithmetic:
    """The quantization that ends in `cast`, a conversion to fp8.

    Raises NotFound when nothing in it is a group's amax and Unsupported when it is a quantization of another kind.
    """
    quotient = _peel_clamps(first_arg(cast))
    dividend, divide, scale_use = _division(quotient)
    scale, facts = read_scale(scale_use, divide)
    if dtype(cast) != torch.float8_e4m3fn:
        raise Unsupported(f"the data is {str(dtype(cast)).removeprefix('torch.')}; the kernels make float8_e4m3fn")
    if dtype(quotient) != torch.float32:
        raise Unsupported("the division by the scale is not in float32")
    y = peel(dividend, is_view, is_widening)
    reduced, dims, _ = reduction(facts.amax) or (facts.amax, [], False)
    of = peel(reduced, is_view, is_widening, lambda n: is_call(n, *ABSOLUTE))
    if not values.same(of, y):
        raise Unsupported(
            f"the amax is taken of {op_name(of)} ({of.name}), another tensor than the quantized one, {op_name(y)} "
            f"({y.name})"
        )
    return Arithmetic(cast, quotient, dividend, scale_use, scale, facts, divide, y, of, _group(reduced, dims))


def complete(found: Arithmetic, k: int) -> Quant:
    """The quantization of rows of k values. Raises Unsupported where its groups are not runs of a row."""
    if k % found.group:
        raise Unsupported(f"K is {k}, not a multiple of the group, {found.group}")
    axes = axes_of(found.y, k, found.group)
    forms = _Forms(found, axes)
    if not scales_groups(forms.of(found.scale_use), forms.of(found.dividend)):
        raise Unsupported("the values do not meet the scale of their own group")
    if flatten(forms.of(found.cast)) != axes.data():
        raise Unsupported("the data is not in the order of the rows")
    if order(forms.of(found.scale)) is None:
        raise Unsupported("the scales are neither in the order of the rows nor in that of the groups")
    spec = _spec(found.facts, found.divide, found.group, found.y)
    inner = frozenset(_between(found))
    return Quant(found.y, found.cast, found.scale, forms.of(found.scale), axes, spec, inner)


def axes_of(y: Node, k: int, group: int) -> Axes:
    """The axes of a quantization of y; one row only where that is known."""
    shape = value(y).shape
    cuts, width = {group, k}, 1
    for size in reversed(shape):
        if width < k and isinstance(size, int):
            width *= size
            cuts.add(width)
    single_row = all(isinstance(size, int) for size in shape) and prod(shape) == k
    return Axes(k, group, single_row, tuple(sorted(cuts)))


def _peel_clamps(node: Node) -> Node:
    while True:
        node = peel(node, is_view)
        bounds = bounds_of(node)
        if bounds is None:
            return node
        low, high = bounds
        if low not in (None, -FP8_MAX) or high not in (None, FP8_MAX):
            raise Unsupported(f"the data is clamped to {bounds}; the kernels clamp to +-448")
        node = first_arg(node)


def _division(quotient: Node) -> tuple[Node, Divide, Node]:
    """y, how it is divided, and the tensor that it meets there: s, 1/s or 448/amax."""
    if is_call(quotient, aten.div.Tensor) and is_tensor(arguments(quotient)[1]):
        return first_arg(quotient), "scale", arguments(quotient)[1]
    for y, factor in factors(quotient):
        inverse = peel(factor, is_view, is_expand)
        if is_call(inverse, aten.reciprocal.default):
            return y, "reciprocal", factor
        if is_call(inverse, aten.div.Tensor) and number(arguments(inverse)[0]) == 1:
            return y, "reciprocal", factor
        if is_call(inverse, aten.div.Tensor) and number(arguments(inverse)[0]) == FP8_MAX:
            raise Unsupported("the data is y * (448 / amax); the pass reads y * (448 * (1 / amax))")
        if is_call(inverse, aten.mul.Tensor) and is_call(arguments(inverse)[0], aten.reciprocal.default):
            return y, _divide_of(number(arguments(inverse)[1])), factor
    raise NotFound(f"its data comes from {op_name(quotient)}; expected a division by the scale of each group")


def _divide_of(factor: float | None) -> Divide:
    """What torch makes of `factor / x` with a Python number: factor * (1 / x)."""
    if factor == 1:
        return "reciprocal"
    if factor == FP8_MAX:
        return "amax"
    raise Unsupported(f"the data is y * ({factor} * (1 / x)); the kernels support 1 and 448 for the factor")


def _group(reduced: Node, dims: list[int]) -> int:
    """The number of values that amax reduces to one."""
    shape = value(reduced).shape
    if len(dims) != 1:
        raise Unsupported(
            "the scale is one of the whole tensor or of several dimensions; the kernels support one per group"
        )
    group = shape[dims[0]]
    if not isinstance(group, int) or group not in GROUPS:
        raise Unsupported(f"the group is {group}; the kernels support {', '.join(map(str, GROUPS))}")
    return group


class _Forms:
    """The forms of the nodes between y and the results of its quantization."""

    def __init__(self, found: Arithmetic, axes: Axes) -> None:
        self.amax, self.quotient, self.dividend = found.facts.amax, found.quotient, found.dividend
        self.lanes = axes.lanes()
        form = axes.of_shape(value(found.y).shape)
        if form is None:
            raise Unsupported(f"rows of {axes.k} values do not fit the shape {tuple(value(found.y).shape)}")
        self.known: dict[Node, Form] = {found.y: form, found.reduced: form}

    def of(self, node: Node) -> Form:
        if node not in self.known:
            form = self._work_out(node)
            if form is None:
                raise Unsupported(f"the rows and groups cannot be followed through {op_name(node)} ({node.name})")
            self.known[node] = form
        return self.known[node]

    def _work_out(self, node: Node) -> Form | None:
        if node is self.amax:
            return self._reduced(node)
        if node is self.quotient:
            return self.of(self.dividend)
        if is_view(node) or is_expand(node):
            return through(node, self.of(first_arg(node)))
        varying = [arg for arg in node.all_input_nodes if is_tensor(arg) and number(arg) is None]
        forms = {self.of(arg) for arg in varying}
        return forms.pop() if len(forms) == 1 else None  # elementwise, the others are constants

    def _reduced(self, node: Node) -> Form | None:
        reduced, dims, keep = reduction(node) or (node, [], False)
        form = self.of(reduced)
        dim = dims[0] % len(form)
        if form[dim] != self.lanes:
            return None
        return without(form, "l") if keep else (*form[:dim], *form[dim + 1 :])


def _spec(facts: Scale, divide: Divide, group: int, y: Node) -> QuantSpec:
    if facts.by_log2:
        check_log2(facts, y)
    try:
        return QuantSpec(
            group=group,
            scale="ue8m0" if facts.ue8m0 else "fp32",
            floor=facts.floor,
            scale_floor=facts.scale_floor,
            scale_by=facts.scale_by or "scalar",
            divide=divide,
        )
    except ValueError as error:
        raise Unsupported(str(error)) from None


def _between(found: Arithmetic) -> set[Node]:
    """The nodes on the way from y to its quantization, without y and the two results."""
    seen: set[Node] = set()
    pending = [found.cast, found.scale]
    while pending:
        for arg in pending.pop().all_input_nodes:
            varies = (is_tensor(arg) and number(arg) is None) or is_call(arg, aten.max.dim)  # which makes two tensors
            if arg not in (found.y, found.reduced) and arg not in seen and varies:
                seen.add(arg)
                pending.append(arg)
    return seen - {found.cast, found.scale}
