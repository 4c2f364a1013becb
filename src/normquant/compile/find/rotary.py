"""Rotary position embedding in aten operations, recognised by what it computes.

    cos, sin = cache[positions]               [M, R], cos in the first half
    y        = x turned by these angles       [M, R] bf16 or fp16

The embedding is spelled in many ways: products with the halves of x, or with x and a copy of it that is cut, negated
and put together again; pairs of neighbours or of halves; angles repeated or not. None of them is looked for. The
operations between x and a candidate for y, which are cuts, views, sums and products and nothing else, are run on
made-up numbers and have to give what `normquant.reference.rotate` does, to the bit, which also tells roundings apart.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node
from torch.fx.node import map_arg

from normquant import reference
from normquant.compile.find.graph import (
    PERMUTES,
    RESHAPES,
    SAME_VALUES,
    UNIT_DIMS,
    Unsupported,
    arguments,
    aten,
    dtype,
    is_call,
    is_tensor,
    is_view,
    op_name,
    peel,
    prims,
    same_shape,
    same_size,
    value,
)
from normquant.compile.find.quant_ops import functionalized
from normquant.spec import QuantSpec, Rope

ARITHMETIC = {aten.add.Tensor, aten.mul.Tensor, aten.neg.default, aten.sub.Tensor, prims.convert_element_type.default}
CUTS = {
    aten.cat.default,
    aten.copy.default,
    aten.slice.Tensor,
    aten.slice_scatter.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    operator.getitem,
}
VIEWS = {*PERMUTES, *RESHAPES, *SAME_VALUES, *UNIT_DIMS, aten.expand.default}
POSITION_DTYPES = (torch.int32, torch.int64)
ROWS = 3  # of the made-up numbers, where the graph does not say how many


@dataclass(frozen=True)
class Rotation:
    """y: x turned, [..., R] in the order of x's rows. cache: [positions, R]. positions: [M], which row of the cache
    belongs to which row of x. inner: the nodes from x, cache and positions to y, y among them."""

    y: Node
    cache: Node
    positions: Node
    rope: Rope
    inner: frozenset[Node]


def find_rotation(copies: Sequence[Node], rows: Any, spec: QuantSpec) -> Rotation:
    """The rotary embedding of x [rows, R] with the roundings of the op that has this spec; the first in the graph.

    copies: the nodes that are x; vLLM's graphs have a slice for each time that the model says x.
    Raises Unsupported where x goes through none, or through one that the op does not support.
    """
    x = copies[0]
    if value(x).dim() != 2:
        raise Unsupported(f"k_pe has shape {tuple(value(x).shape)}; it is followed as [M, R]")
    made = followers(copies)
    for y in made:
        if is_tensor(y) and dtype(y) == dtype(x) and same_size(value(y).numel(), value(x).numel()):
            inner = between(copies, y, rows)
            gathers = [node for node in inner if is_gather(node, rows)]
            same = len({(cache, positions) for cache, (positions,) in map(arguments, gathers)}) == 1
            rope = _rope(copies, y, gathers, inner, rows, spec) if same else None
            if rope is not None:
                cache, (positions,) = arguments(gathers[0])
                return Rotation(y, cache, positions, rope, frozenset(inner))
    readers = {user for node in (*copies, *made) for user in node.users if user not in made}
    names = ", ".join(sorted({functionalized(user).replace("::", ".") or op_name(user) for user in readers}))
    raise Unsupported(f"no rotary embedding in aten operations between k_pe and what reads it ({names})")


def check_cache(cache: Node) -> None:
    """Raise Unsupported for a cache of cos and sin that the ops cannot read where it lies."""
    if peel(cache, is_view).op == "call_function":
        raise Unsupported("the cache of cos and sin is computed in the graph; the op would need all of it")


def updates_cache(node: Node) -> bool:
    """Whether node is vLLM's update of the kv cache, into which vLLM may put the rotary embedding itself."""
    return op_name(node) == "vllm.unified_mla_kv_cache_update"


def followers(copies: Sequence[Node]) -> list[Node]:
    """What is made from x by cuts, views and arithmetic alone, in the order of the graph."""
    found: set[Node] = set()
    pending = [*copies]
    while pending:
        new = [user for user in pending.pop().users if is_pure(user) and user not in found]
        found.update(new)
        pending += new
    return sorted(found)


def is_pure(node: Node) -> bool:
    """Whether node is a cut, a view or arithmetic."""
    return is_call(node, *ARITHMETIC, *CUTS, *VIEWS)


def is_gather(node: Node, rows: Any) -> bool:
    """Whether node is cache[positions], a row of angles for each row of x."""
    if not is_call(node, aten.index.Tensor) or len(arguments(node)[1]) != 1:
        return False
    cache, (positions,) = arguments(node)
    fits = is_tensor(positions) and dtype(positions) in POSITION_DTYPES and same_shape(value(positions).shape, (rows,))
    return fits and value(cache).dim() == 2


def between(copies: Sequence[Node], y: Node, rows: Any) -> list[Node]:
    """The nodes that y is made with, from x and angles on, in the order of the graph; empty where others take part."""
    found: set[Node] = set()
    pending = [y]
    while pending:
        node = pending.pop()
        if node in copies or node in found or _is_size(node, rows):
            continue
        found.add(node)
        if is_pure(node):
            pending += node.all_input_nodes
        elif not is_gather(node, rows):
            return []
    return sorted(found)


def _is_size(node: Node, rows: Any) -> bool:
    """Whether node is the number of rows."""
    size = node.meta.get("val")
    return isinstance(size, torch.SymInt) and same_size(size, rows)


def _rope(
    copies: Sequence[Node], y: Node, gathers: Sequence[Node], inner: list[Node], rows: Any, spec: QuantSpec
) -> Rope | None:
    """How y turns x, None where it does something else. Raises Unsupported where it is not rounded as the op does."""
    count, width = rows if isinstance(rows, int) else ROWS, value(copies[0]).shape[-1]
    if value(gathers[0]).shape[-1] != width or width % 2:
        return None
    with unset_fake_temporarily(), torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        x, angles = (
            torch.randn(count, width, generator=generator, device="cpu").to(dtype(nodes[0]))
            for nodes in (copies, gathers)
        )
        given = dict.fromkeys(copies, x) | dict.fromkeys(gathers, angles)
        return _compared(x, angles, computed(y, inner, given, count).reshape(count, width), spec)


def computed(y: Node, inner: Sequence[Node], given: dict[Node, torch.Tensor], count: int) -> torch.Tensor:
    """y as the nodes of inner, in the order of the graph, make it of the values given, for so many rows."""
    values: dict[Node, Any] = dict(given)
    for node in inner:
        if node not in values:
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: values.get(n, count))
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return values[y]


def _compared(x: torch.Tensor, angles: torch.Tensor, y: torch.Tensor, spec: QuantSpec) -> Rope | None:
    """The rope that turns x [M, R] by cos and sin, the halves of angles [M, R], into y [M, R]."""
    cos, sin = angles.chunk(2, dim=-1)
    by_product = spec.rounding in ("inner", "twice")
    other, how = ("none", "once, after the sum") if by_product else ("twice", "after each product")
    for rope in get_args(Rope):
        if torch.equal(reference.rotate(x, cos, sin, rope, spec), y):
            return rope
        if torch.equal(reference.rotate(x, cos, sin, rope, spec.replace(rounding=other)), y):
            beside = f"beside a norm of rounding={spec.rounding!r} the op does not"
            raise Unsupported(f"the rotary embedding rounds {how}; {beside}")
    return None
