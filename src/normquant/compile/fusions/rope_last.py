"""Put the rotary position embedding of q into one op, as vLLM's MLA layer has it in front of the attention.

    q = [nope, pe] of each head                 [M, H * D] bf16 or fp16, one projection
    y = [nope, pe turned by cache[positions]]   [M, H * D] like q, aten operations

The turned part is written into a copy of q, or put together with the rest again; that no spelling is looked for is as
in `rotary`. Heads that are turned as a whole stay: there the compiler has q and k in one kernel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, get_args

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Graph, Node

from normquant import reference
from normquant.compile.edit.build import Builder, Rewrite, as_rows, shaped
from normquant.compile.find.graph import (
    Unsupported,
    arguments,
    aten,
    dtype,
    is_tensor,
    mutation_regions,
    op_name,
    same_shape,
    same_size,
    value,
)
from normquant.compile.find.rotary import (
    ROWS,
    between,
    check_cache,
    computed,
    followers,
    is_gather,
    is_pure,
    updates_cache,
)
from normquant.compile.fusions.acceptance import check_op, rows_of, sines_of
from normquant.compile.fusions.candidate import (
    Candidate,
    Findings,
    bytes_of,
    rejected,
    rows_seen,
    site_name,
    source_line,
)
from normquant.spec import ACTIVATION_DTYPES, QuantSpec, Rope

SPECS = (QuantSpec(rounding="twice"), QuantSpec(rounding="once"))  # each product of a rotation is rounded, or its sum


@dataclass(frozen=True)
class TurnedHeads:
    """y: x [M, ...], of which the last r values of each head are turned. gathers: every cache[positions], [M, r], of
    the graph that gives the angles. inner: the nodes from x and the angles to y, y among them."""

    x: Node
    y: Node
    gathers: tuple[Node, ...]
    heads: int
    r: int
    rope: Rope
    spec: QuantSpec
    inner: frozenset[Node]

    @property
    def cache(self) -> Node:
        """[positions, r]."""
        return arguments(self.gathers[0])[0]

    @property
    def positions(self) -> Node:
        """[M]."""
        return arguments(self.gathers[0])[1][0]

    @property
    def rows(self) -> Any:
        return value(self.positions).shape[0]

    @property
    def width(self) -> int:
        return math.prod(value(self.x).shape[1:])


def find(graph: Graph) -> Findings:
    """Every tensor of heads that is turned."""
    regions = mutation_regions(graph)
    for turned in find_turned(graph):
        name, where, k = site_name(turned.y), source_line(turned.y), turned.width
        x, rows = value(turned.x), turned.rows
        try:
            _check(turned, regions)
        except Unsupported as reason:
            known: dict[str, Any] = {"m": str(rows), "k": k, "dtype": str(x.dtype).removeprefix("torch.")}
            yield rejected(name, where, f"the rotary embedding of q: {reason}", **known)
            continue
        traffic = {"bytes_moved": bytes_of("rope_last", rows_seen(rows), k, turned.spec, r=turned.r)}
        fuse = partial(_fuse, turned)
        yield Candidate(name, where, "rope_last", x, rows, k, turned.spec, fuse, traffic=traffic)


def find_turned(graph: Graph) -> list[TurnedHeads]:
    """Every tensor of heads whose last values are turned by rows of one cache, in aten operations."""
    gathers: dict[tuple[Node, Node], list[Node]] = {}  # the graph may have one for each time that the model says it
    for node in graph.nodes:
        if _is_own_gather(node):
            cache, (positions,) = arguments(node)
            gathers.setdefault((cache, positions), []).append(node)
    return [turned for group in gathers.values() for turned in _turned_by(group)]


def _is_own_gather(node: Node) -> bool:
    return is_tensor(node) and value(node).dim() == 2 and is_gather(node, value(node).shape[0])


def _turned_by(gathers: list[Node]) -> Iterator[TurnedHeads]:
    """What is turned by these gathers, which are the same angles."""
    angles = value(gathers[0])
    rows, r = angles.shape
    if not isinstance(r, int) or r % 2:
        return
    made, done = followers(gathers), set[Node]()
    for y in made:
        width = _width(y, rows)
        if y in done or width is None or width <= r or dtype(y) not in ACTIVATION_DTYPES:
            continue
        for x in _sources(y, rows, set(made)):
            inner = between([x], y, rows)
            if inner and all(node in gathers for node in inner if is_gather(node, rows)):
                how = _compared(x, y, gathers, inner)
                if how is not None:
                    done.update(followers([y]))
                    heads, rope, spec = how
                    yield TurnedHeads(x, y, tuple(gathers), heads, r, rope, spec, frozenset(inner))
                    break


def _width(node: Node, rows: Any) -> int | None:
    """Values of a row of [M, ...]; None for anything else."""
    shape = value(node).shape if is_tensor(node) else ()
    if len(shape) < 2 or not all(isinstance(size, int) for size in shape[1:]) or not same_size(shape[0], rows):
        return None
    return math.prod(shape[1:])


def _sources(y: Node, rows: Any, made: set[Node]) -> list[Node]:
    """What y may be a turned form of, in the order of the graph: tensors like y that no angle has gone into."""
    width = _width(y, rows)
    seen: set[Node] = set()
    pending = [y]
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending += node.all_input_nodes if is_pure(node) else []
    return sorted(x for x in seen - made if _width(x, rows) == width and dtype(x) == dtype(y))


def _compared(x: Node, y: Node, gathers: list[Node], inner: list[Node]) -> tuple[int, Rope, QuantSpec] | None:
    """In how many heads y turns x, and how, seen on made-up numbers; None where it does something else."""
    rows, r = value(gathers[0]).shape
    width = math.prod(value(x).shape[1:])
    count = rows if isinstance(rows, int) else ROWS
    with unset_fake_temporarily(), torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        numbers, angles = (
            torch.randn(count, n, generator=generator, device="cpu").to(dtype(node))
            for n, node in ((width, x), (r, gathers[0]))
        )
        given = {x: numbers.view(count, *value(x).shape[1:])} | dict.fromkeys(gathers, angles)
        result = computed(y, inner, given, count).reshape(count, width)
        counts = _head_counts(x, inner, rows, width, r)
        for heads, rope, spec in product(counts, get_args(Rope), SPECS):
            args = (numbers, angles, angles[:, r // 2 :], None, heads, r, rope, spec)
            if torch.equal(result, reference.rope_last(*args)):
                return heads, rope, spec
    return None


def _head_counts(x: Node, inner: list[Node], rows: Any, width: int, r: int) -> list[int]:
    """The numbers of heads, wider than what is turned of them, that rows of this width are seen as; one among them."""
    seen = {value(node).shape[-1] for node in (x, *inner) if _width(node, rows) == width}
    return [width // d for d in sorted(seen | {width}) if d > r]


def _check(turned: TurnedHeads, regions: dict[Node, int]) -> None:
    """Raise Unsupported where the op does not support it, or where it is better left to someone else."""
    y = value(turned.y)
    check_cache(turned.cache)
    angles = value(turned.cache), sines_of(turned.cache, turned.r), value(turned.positions)
    how = (turned.heads, turned.r, turned.rope, turned.spec)
    check_op("rope_last", rows_of(turned.x, turned.width), *angles, *how)
    if not _is_contiguous(y):
        raise Unsupported(f"it has stride {tuple(y.stride())}; the kernel writes whole rows")
    _check_readers(turned)
    if len({regions[node] for node in turned.inner}) > 1:
        raise Unsupported("a tensor is changed in place while it is computed")


def _is_contiguous(y: torch.Tensor) -> bool:
    """Whether y [M, ...] has its rows behind one another; asks without adding a guard."""
    strides = [math.prod(y.shape[i + 1 :]) for i in range(y.dim())]
    return same_shape(y.stride(), strides)


def _check_readers(turned: TurnedHeads) -> None:
    angles = followers(turned.gathers)
    if any(updates_cache(user) for node in angles for user in node.users):
        raise Unsupported("vLLM puts it into its update of the kv cache (fuse_rope_kvcache_cat_mla)")
    parts = turned.inner & set(angles) & set(followers([turned.x])) - {turned.y}
    others = {op_name(user) for node in parts for user in node.users if user not in turned.inner}
    if others:
        raise Unsupported(f"what is turned is also read by itself ({', '.join(sorted(others))})")


def _fuse(turned: TurnedHeads, new: Builder) -> Rewrite:
    """The op where y is, whose output goes to the readers of y."""
    with new.before(turned.y):
        x = as_rows(new, turned.x, turned.width)
        sin = new(aten.slice.Tensor, turned.cache, 1, turned.r // 2, turned.r)
        how = (turned.heads, turned.r, turned.rope, turned.spec.encode())
        op = new(torch.ops.normquant.rope_last.default, x, turned.cache, sin, turned.positions, *how)
        output = shaped(new, op, turned.y)
    return Rewrite(((turned.y, output),), like=turned.y, note="was one generated kernel")
