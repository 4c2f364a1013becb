"""The scale of a group quantization, read backwards from where the values are divided by it down to its amax."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from math import inf, log2
from typing import Any

import torch
from torch.fx import Node

from normquant.compile.find.graph import (
    NotFound,
    Unsupported,
    arguments,
    aten,
    dtype,
    first_arg,
    is_call,
    is_expand,
    is_python_number,
    is_tensor,
    is_view,
    is_widening,
    number,
    op_name,
    peel,
    value,
)
from normquant.spec import FP8_MAX, Divide, ScaleBy

LOWER = (aten.clamp_min.default, aten.clamp_min.Tensor, aten.maximum.default)
UPPER = (aten.clamp_max.default, aten.clamp_max.Tensor, aten.minimum.default)
CLAMPS = (aten.clamp.default, aten.clamp.Tensor)
ABSOLUTE = (aten.abs.default,)
ADDS = (aten.add.Tensor, aten.add.Scalar)
MASKS = (aten.bitwise_and.Scalar, aten.bitwise_and.Tensor)
PRODUCTS = (aten.mul.Tensor, aten.mul.Scalar)
SCALINGS = (*PRODUCTS, aten.div.Tensor, aten.div.Scalar)


@dataclass
class Scale:
    """What is known of a scale while its arithmetic is read backwards."""

    amax: Node
    floor: float = 0.0
    scale_floor: float = 0.0
    scale_by: ScaleBy | None = None
    ue8m0: bool = False
    by_log2: bool = False


def bounds_of(node: Node) -> tuple[float | None, float | None] | None:
    if is_call(node, *LOWER):
        low = number(arguments(node)[1])
        return None if low is None else (low, None)
    if is_call(node, *UPPER):
        high = number(arguments(node)[1])
        return None if high is None else (None, high)
    if is_call(node, *CLAMPS):
        bounds = [*arguments(node), None, None][1:3]
        low, high = map(number, bounds)
        return (low, high) if (low, high).count(None) == bounds.count(None) else None
    return None


def read_scale(use: Node, divide: Divide) -> tuple[Node, Scale]:
    """The node that holds s, and its arithmetic."""
    node = peel(use, is_view, is_expand)
    if divide == "scale":
        return node, _scale_arithmetic(node)
    if is_call(node, aten.mul.Tensor):  # reciprocal(s) * 1
        node = first_arg(node)
    if divide == "reciprocal":
        inverted = arguments(node)[1] if is_call(node, aten.div.Tensor) else arguments(node)[0]
        scale = peel(inverted, is_view, is_expand)
        return scale, _scale_arithmetic(scale)
    floored = peel(arguments(node)[0], is_view, is_expand)
    for candidate in _scales_of(floored):
        with suppress(NotFound, Unsupported):  # the amax may be scaled for others, too
            return candidate, _scale_arithmetic(candidate)
    raise Unsupported("the data is y * (448 / amax), and nothing in the graph holds amax / 448")


def _scales_of(amax: Node) -> Iterator[Node]:
    """Where amax becomes a scale: the divisions and products of its views with a constant."""
    pending = [amax]
    while pending:
        for user in pending.pop().users:
            if is_view(user):
                pending.append(user)
            elif is_call(user, *SCALINGS) and number(arguments(user)[1]) is not None:
                yield user


def reduction(node: Node) -> tuple[Node, list[int], bool] | None:
    """What a maximum reduces, its dimensions, and whether they stay with size 1; None for any other operation."""
    if is_call(node, operator.getitem) and is_call(arguments(node)[0], aten.max.dim) and arguments(node)[1] == 0:
        tensor, dim, *keep = arguments(arguments(node)[0])
        return tensor, [dim], bool(keep and keep[0])
    if not is_call(node, aten.amax.default):
        return None
    tensor, dims, keep = [*arguments(node), None, None][:3]
    return tensor, list(dims or range(value(tensor).dim())), bool(keep)


def _scale_arithmetic(scale: Node) -> Scale:
    """Read s back to its amax. Steps come from the outside in: power of two, scale floor, division, amax floor."""
    node, facts = scale, Scale(scale)
    while reduction(node) is None:
        node = peel(node, is_view, is_widening)
        if reduction(node) is not None:
            break
        if node.op != "call_function" or not arguments(node):
            raise _no_amax(node)
        if dtype(node) != torch.float32 and not is_call(node, *LOWER, *CLAMPS, *ABSOLUTE):
            raise Unsupported(f"the scale is computed in {str(dtype(node)).removeprefix('torch.')}, not in float32")
        node = _step_back(node, facts)
    facts.amax = node
    if facts.scale_by is None:
        raise Unsupported("the scale is not amax / 448")
    return facts


def _step_back(node: Node, facts: Scale) -> Node:
    by_log2, by_bits = _power_of_two(node), _rounded_up_by_bits(node)
    scale = by_log2 if by_bits is None else by_bits
    if scale is not None:
        if facts.scale_by or facts.scale_floor or facts.ue8m0:
            raise Unsupported("a scale is changed after it was rounded to a power of two")
        facts.ue8m0, facts.by_log2 = True, by_bits is None
        return scale
    bounds = bounds_of(node)
    if bounds is not None:
        return _floor(node, bounds, facts)
    if is_call(node, *SCALINGS):
        return _scale_by(node, facts)
    if is_call(node, *ABSOLUTE):
        return first_arg(node)  # a scale is not negative
    if is_call(node, aten.where.self, aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.view.dtype):
        raise Unsupported(f"the scale passes through {op_name(node)}; the kernels support amax / 448 with floors")
    raise _no_amax(node)


def _no_amax(node: Node) -> NotFound:
    return NotFound(f"its scale comes from {op_name(node)} ({node.name}); expected the amax of each group")


def _floor(node: Node, bounds: tuple[float | None, float | None], facts: Scale) -> Node:
    low, high = bounds
    if low is None or high is not None:
        raise Unsupported("the scale has an upper bound; the kernels support none")
    if dtype(node) != torch.float32:
        low = float(torch.tensor(low, dtype=dtype(node)))  # a bf16 clamp compares with a bf16 bound
    before_division = facts.scale_by is not None
    if facts.floor if before_division else (facts.scale_floor or (facts.ue8m0 and facts.scale_by)):
        raise Unsupported("the amax or the scale is clamped twice")
    if before_division:
        facts.floor = low
    else:
        facts.scale_floor = low
    return first_arg(node)


def _scale_by(node: Node, facts: Scale) -> Node:
    if facts.scale_by is not None:
        raise Unsupported("the amax is scaled twice")
    amax, constant = arguments(node)[:2]
    if is_call(node, *PRODUCTS) and number(amax) is not None:
        amax, constant = constant, amax
    factor = number(constant)
    if factor is None or not is_tensor(amax):
        raise _no_amax(node)
    if is_call(node, *PRODUCTS):
        facts.scale_by = "multiply"
        exact = bool(torch.tensor(factor, dtype=torch.float32) == torch.tensor(1 / FP8_MAX, dtype=torch.float32))
    else:
        # torch's CUDA kernels divide by a number of the host as a product with its reciprocal, by a tensor truly
        facts.scale_by = "scalar" if is_python_number(constant) or value(constant).device.type == "cpu" else "divide"
        if facts.scale_by == "scalar" and not is_python_number(constant) and value(node).device.type == "cpu":
            facts.scale_by = "divide"
        exact = factor == FP8_MAX
    if not exact:
        raise Unsupported(
            f"the scale is amax {'*' if facts.scale_by == 'multiply' else '/'} {factor}; the kernels divide by 448"
        )
    return amax


def _power_of_two(node: Node) -> Node | None:
    """v of 2 ** ceil(log2(v))."""
    if is_call(node, aten.exp2.default):
        exponent = arguments(node)[0]
    elif is_call(node, aten.pow.Scalar) and number(arguments(node)[0]) == 2:
        exponent = arguments(node)[1]
    else:
        return None
    ceil = peel(exponent, is_view) if is_tensor(exponent) else exponent
    if is_call(ceil, aten.ceil.default) and is_call(arguments(ceil)[0], aten.log2.default):
        return arguments(arguments(ceil)[0])[0]
    raise Unsupported(f"the scale is a power of two by {op_name(ceil)}; the kernels support 2 ** ceil(log2(s))")


def _rounded_up_by_bits(node: Node) -> Node | None:
    """v of (v.view(int32) + 0x7FFFFF & 0x7F800000).view(float32), which is the power of two above v. A graph may leave
    inf and NaN as they are, as the kernels do; where it does not, NaN becomes 0 there."""
    if is_call(node, aten.where.self):
        finite, up, v = map(_peeled, arguments(node))
        return v if _is_finite(finite, v) and _rounded_up_by_bits(up) is v else None
    masked = _peeled(arguments(node)[0]) if is_call(node, aten.view.dtype) and dtype(node) == torch.float32 else None
    if not is_call(masked, *MASKS) or number(arguments(masked)[1]) != 0x7F800000:
        return None
    total = _peeled(arguments(masked)[0])
    if not is_call(total, *ADDS) or number(arguments(total)[1]) != 0x7FFFFF:
        return None
    bits = _peeled(arguments(total)[0])
    return _peeled(arguments(bits)[0]) if is_call(bits, aten.view.dtype) and dtype(bits) == torch.int32 else None


def _peeled(arg: Any) -> Any:
    return peel(arg, is_view) if is_tensor(arg) else arg


def _is_finite(condition: Any, v: Node) -> bool:
    """Whether a condition is that v is a finite number: |v| < inf, or how torch spells `isfinite`."""
    if is_call(condition, aten.mul.Tensor, aten.logical_and.default, aten.bitwise_and.Tensor):
        number_, bounded = map(_peeled, arguments(condition)[:2])
        itself = is_call(number_, aten.eq.Tensor) and all(_peeled(arg) is v for arg in arguments(number_))
        return itself and is_call(bounded, aten.ne.Scalar) and _is_magnitude_and_inf(bounded, v)
    return is_call(condition, aten.lt.Scalar) and _is_magnitude_and_inf(condition, v)


def _is_magnitude_and_inf(comparison: Node, v: Node) -> bool:
    magnitude, bound = arguments(comparison)
    return is_call(magnitude, *ABSOLUTE) and _peeled(first_arg(magnitude)) is v and number(bound) == inf


def check_log2(facts: Scale, y: Node) -> None:
    """2 ** ceil(log2(s)) in fp32 is the power of two above s, except where log2 rounds: just above a power of two.

    The scale of a value with 8 or 11 significant bits is a power of two or at least 2**-11 away from one, so only the
    scales of a norm that was not rounded, and a floor, can lie there.
    """
    if dtype(y) == torch.float32:
        raise Unsupported(
            "ue8m0 scales by log2 of a norm that was not rounded: the kernels round up exactly, log2 does not"
        )
    smallest = max(facts.floor / FP8_MAX, facts.scale_floor)
    if smallest > 0 and 0 < log2(smallest) % 1 < 1e-4:
        raise Unsupported(f"ue8m0 scales by log2 with the smallest scale {smallest}, just above a power of two")
