"""silu(g) = g / (1 + exp(-g)), as torch decomposes it, and the clamps that a model puts in front of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from normquant.compile.find.graph import (
    Unsupported,
    arguments,
    aten,
    dtype,
    factors,
    first_arg,
    is_call,
    is_narrowing,
    is_widening,
    number,
)


@dataclass(frozen=True)
class Silu:
    """One silu in fp32. wide: g in fp32. inner: the nodes from its value back to g, without g."""

    wide: Node
    inner: frozenset[Node]


@dataclass(frozen=True)
class Clamped:
    """x, clamped in fp32 and rounded back. low, high: None where there is no limit. inner: the nodes from the value
    back to x, without x."""

    x: Node
    low: float | None = None
    high: float | None = None
    inner: frozenset[Node] = frozenset()


def silu(quotient: Node) -> Silu | None:
    """The silu whose value this node is; None for any other node."""
    if not is_call(quotient, aten.div.Tensor):
        return None
    wide, total = arguments(quotient)[:2]
    if not (is_call(total, aten.add.Tensor) and sorted(map(str, map(number, arguments(total)))) == ["1.0", "None"]):
        return None
    power = next(arg for arg in arguments(total) if number(arg) is None)
    if not is_call(power, aten.exp.default) or not is_call(first_arg(power), aten.neg.default):
        return None
    if first_arg(first_arg(power)) is not wide:
        return None
    return Silu(wide, frozenset((quotient, total, power, first_arg(power))))


def scaled_sigmoid(product: Node) -> float | None:
    """a of g * sigmoid(a * g), which is silu for 1; None for any other node."""
    for gate, sigmoid in factors(product):
        if is_call(sigmoid, aten.sigmoid.default):
            scaled = first_arg(sigmoid)
            if scaled is gate:
                return 1.0
            if is_call(scaled, aten.mul.Tensor) and first_arg(scaled) is gate:
                return number(arguments(scaled)[1])
    return None


def clamped(node: Node) -> Clamped:
    """What a node clamps: bf16 or fp16, which torch widens and rounds back. The node itself where it clamps nothing.

    Raises Unsupported for limits that are no numbers.
    """
    limits: dict[object, float] = {}
    inner, x = {node}, node
    if not is_narrowing(node):
        return Clamped(node)
    for clamp in (aten.clamp_max.default, aten.clamp_min.default):
        if is_call(before := first_arg(x), clamp):
            limit = number(arguments(before)[1])
            if limit is None:
                raise Unsupported("a clamp's limit is computed in the graph")
            limits[clamp] = limit
            inner.add(before)
            x = before
    wide = first_arg(x)
    if not limits or not is_widening(wide) or dtype(first_arg(wide)) != dtype(node):
        return Clamped(node)
    low, high = (limits.get(clamp) for clamp in (aten.clamp_min.default, aten.clamp_max.default))
    return Clamped(first_arg(wide), low, high, frozenset((*inner, wide)))
