"""Find the norm -> quant sites of a graph, by meaning: from each quantization back to the norm that feeds it.

A site is one norm and every quantization of it that asks for the same result. What stands in the way of fusing it is
found here as well: values inside of it that somebody else reads, tensors that are changed on the way, inputs that the
kernels cannot read. `find` changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Graph, Node

from normquant.compile import norm_ops, opaque, quants
from normquant.compile.graph import (
    FP8_DTYPES,
    NotFound,
    Unsupported,
    arguments,
    asks_shape,
    dtype,
    first_arg,
    is_cast,
    is_narrowing,
    is_tensor,
    is_view,
    is_widening,
    keeps_order,
    mutation_regions,
    op_name,
    peel,
    value,
)
from normquant.compile.norms import Norm
from normquant.compile.quants import Quant
from normquant.compile.scales import choose_layout
from normquant.spec import QuantSpec


@dataclass(frozen=True)
class Match:
    """A site that the kernels can do.

    spec: the arithmetic of norm and quantization together.
    norms: the nodes that hold the norm, in the activation dtype, for readers outside of the site; empty without any.
    """

    norm: Norm
    quants: tuple[Quant, ...]
    spec: QuantSpec
    norms: tuple[Node, ...] = ()

    @property
    def inner(self) -> frozenset[Node]:
        """The nodes that are gone once the site is one op."""
        return self.norm.inner.union(*(quant.inner for quant in self.quants))

    @property
    def results(self) -> frozenset[Node]:
        nodes = {node for quant in self.quants for node in (quant.data, quant.scale) if node is not None}
        return frozenset(nodes | set(self.norms) | {self.norm.y})


@dataclass(frozen=True)
class Rejected:
    """A site that stays as it is. anchor: its quantization. norm: where it was read."""

    anchor: Node
    reason: str
    norm: Norm | None = None


@dataclass
class Found:
    """matches can be fused, rejected cannot, others are quantizations with no norm in front of them."""

    matches: list[Match] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    others: list[Rejected] = field(default_factory=list)


def find(graph: Graph) -> Found:
    """Every norm -> quant site of the graph."""
    found = Found()
    pairs: list[tuple[Node, Norm, Quant]] = []
    norms: dict[Node, Norm | Unsupported | NotFound] = {}
    for anchor in graph.nodes:
        if is_anchor(anchor):
            _read(anchor, norms, pairs, found)
    matches = _group(pairs, found)
    _reject_shared(matches, found)
    regions = mutation_regions(graph)
    found.matches = [match for match in matches if _checked(match, found, regions)]
    return found


def is_anchor(node: Node) -> bool:
    """Whether a quantization to fp8 ends here."""
    if opaque.is_quant(node):
        return True
    return (
        is_cast(node) and is_tensor(node) and dtype(node) in FP8_DTYPES and dtype(arguments(node)[0]) not in FP8_DTYPES
    )


def _read(anchor: Node, norms: dict, pairs: list, found: Found) -> None:
    """Read one quantization and the norm in front of it."""
    norm, y = None, first_arg(anchor) if is_cast(anchor) else opaque.quantized(anchor)
    try:
        arithmetic = None
        if is_cast(anchor):
            arithmetic = quants.read_arithmetic(anchor)
            y = arithmetic.y
        norm = _norm_of(y, norms)
        if arithmetic:
            quant = quants.complete(arithmetic, norm.k)
        else:
            quant = opaque.read(anchor, norm.k)
        pairs.append((anchor, norm, quant))
    except NotFound:
        source = op_name(peel(y, is_view, is_cast))
        found.others.append(Rejected(anchor, f"its input is {source}, not an RMSNorm"))
    except Unsupported as reason:
        near_norm = norm is not None or _follows_norm(anchor)
        (found.rejected if near_norm else found.others).append(Rejected(anchor, str(reason), norm))


def _norm_of(y: Node, norms: dict[Node, Norm | Unsupported | NotFound]) -> Norm:
    if y not in norms:
        try:
            norms[y] = norm_ops.read_norm(y)
        except (Unsupported, NotFound) as reason:
            norms[y] = reason
    norm = norms[y]
    if isinstance(norm, Norm):
        return norm
    raise norm


def _follows_norm(anchor: Node) -> bool:
    """Whether an rsqrt or sqrt is among the last few operations before a quantization that could not be read."""
    pending, seen = [anchor], {anchor}
    while pending and len(seen) < 64:
        for node in pending.pop(0).all_input_nodes:
            name = op_name(node)
            if name in ("aten.rsqrt", "aten.sqrt", *norm_ops.NAMES):
                return True
            if node not in seen and name.startswith(("aten.", "prims.")):
                seen.add(node)
                pending.append(node)
    return False


def _group(pairs: list[tuple[Node, Norm, Quant]], found: Found) -> list[Match]:
    """One match for each norm and arithmetic; the scale layout is chosen here."""
    groups: dict[tuple[Node, QuantSpec], list[Quant]] = {}
    norms: dict[Node, Norm] = {}
    for anchor, norm, quant in pairs:
        try:
            spec = quant.spec.but(rounding=norm.rounding, sum=norm.addition.sum if norm.addition else "fp32")
            if quant.scale is not None and quant.scale_form is not None:
                spec = spec.but(layout=choose_layout(quant.scale, quant.scale_form, quant.inner))
        except ValueError as error:
            found.rejected.append(Rejected(anchor, str(error), norm))
            continue
        norms[norm.y] = norm
        groups.setdefault((norm.y, spec), []).append(quant)
    return [Match(norms[y], tuple(members), spec) for (y, spec), members in groups.items()]


def _reject_shared(matches: list[Match], found: Found) -> None:
    """Drop the matches whose inside is read by something that stays, until no such match is left."""
    while True:
        gone = frozenset().union(*(match.inner for match in matches)) if matches else frozenset()
        results = frozenset().union(*(match.results for match in matches)) if matches else frozenset()
        for i, match in enumerate(matches):
            try:
                matches[i] = replace(match, norms=_readers_of_norm(match, gone))
                _check_inside(match, gone | results)
            except Unsupported as reason:
                found.rejected.append(Rejected(anchor_of(match), str(reason), match.norm))
                del matches[i]
                break
        else:
            return


def anchor_of(match: Match) -> Node:
    quant = match.quants[0]
    return quant.data or quant.scale or quant.y


def _check_inside(match: Match, known: frozenset[Node]) -> None:
    stored = set(match.norm.addition.stored) if match.norm.addition else set()
    for node in match.norm.inner:
        users = [user for user in node.users if not asks_shape(user, match.norm.sources[0])]
        outside = [user for user in users if user not in known and user not in stored]
        if outside:
            raise Unsupported(_read_by(node, "the norm", outside[0]))
    for quant in match.quants:
        for node in quant.inner:
            users = [user for user in node.users if not asks_shape(user, match.norm.sources[0])]
            outside = [user for user in users if user not in known]
            if outside and not (is_view(node) or is_widening(node)) and not _only_pads(node, quant):
                raise Unsupported(_read_by(node, "the quantization", outside[0]))


def _read_by(node: Node, where: str, reader: Node) -> str:
    return f"{op_name(node)} inside of {where} is also read by {op_name(reader)} ({reader.name})"


def _only_pads(node: Node, quant: Quant) -> bool:
    return opaque.is_quant(node) and all(user in (quant.data, quant.scale) or not user.users for user in node.users)


def _readers_of_norm(match: Match, gone: frozenset[Node]) -> tuple[Node, ...]:
    """The nodes that hold the norm for readers outside of the site."""
    y = match.norm.y
    outside: list[Node] = []
    pending = [y]
    while pending:
        node = pending.pop()
        for user in node.users:
            if is_view(user) or is_widening(user):
                pending.append(user)
            elif user not in gone and user not in match.results and not asks_shape(user, match.norm.sources[0]):
                outside.append(user if _rounds_y(user, node, match.norm) else node)
    if not outside:
        return ()
    if dtype(y) == match.norm.dtype:
        return (y,)
    unrounded = [node for node in outside if not is_narrowing(node)]
    if unrounded:
        raise Unsupported("the norm before its rounding is also read by an operation outside of the site")
    return tuple(dict.fromkeys(outside))


def _rounds_y(user: Node, node: Node, norm: Norm) -> bool:
    """Whether user is the norm rounded to the activation dtype, in the norm's order."""
    return is_narrowing(user) and dtype(user) == norm.dtype and peel(node, keeps_order) is norm.y


def _checked(match: Match, found: Found, regions: dict[Node, int]) -> bool:
    """Whether the inputs are readable and nothing is changed in place inside of the site."""
    try:
        _check_inputs(match)
        nodes = match.inner | match.results | _passed(match)
        if len({regions[node] for node in nodes}) > 1:
            raise Unsupported("a tensor is changed in place between the norm and the quantization")
    except Unsupported as reason:
        found.rejected.append(Rejected(anchor_of(match), str(reason), match.norm))
        return False
    return True


def _passed(match: Match) -> set[Node]:
    """The casts, views and copies between the inside of the norm and what the op will read."""
    norm = match.norm
    ends = {norm.weight, norm.eps, *norm.sources}
    passed: set[Node] = set()
    pending = list(norm.inner)
    while pending:
        for node in pending.pop().all_input_nodes:
            if node not in ends and node not in norm.inner and node not in passed and node.op == "call_function":
                passed.add(node)
                pending.append(node)
    return passed


def _check_inputs(match: Match) -> None:
    for node in match.norm.sources:
        _check_rows(value(node), match.norm.k)


def _check_rows(x: torch.Tensor, k: int) -> None:
    if x.dim() == 0 or not isinstance(x.stride(-1), int) or x.stride(-1) != 1:
        raise Unsupported(
            f"the norm reads a tensor of stride {tuple(x.stride())}; the kernels need the last one to be 1"
        )
    if not rows_are_even(x, k):
        raise Unsupported(
            f"the norm reads a tensor of shape {tuple(x.shape)} and stride {tuple(x.stride())}, "
            "whose rows are not evenly spaced"
        )


def rows_are_even(x: torch.Tensor, k: int) -> bool:
    """Whether x can be seen as [M, K] without a copy."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    stride: Any = None
    run: Any = 1
    sizes = [
        (size, step)
        for size, step in zip(x.shape, x.stride(), strict=True)
        if not (isinstance(size, int) and size == 1)
    ]
    for size, step in reversed(sizes):
        inside_row = stride is None and isinstance(run, int) and run < k
        if inside_row:
            if not statically_known_true(step == run):
                return False
            run = run * size
            continue
        if stride is not None and not statically_known_true(step == stride):
            return False
        stride = step * size
    return True
