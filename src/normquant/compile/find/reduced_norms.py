"""Norms of a sum over ranks, [all_reduce -> (add ->) norm], with their quantizations or without any."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch.fx import Graph, Node

from normquant.compile.find.all_reduces import AllReduce, any_all_reduce, read_all_reduce
from normquant.compile.find.duplicates import Values
from normquant.compile.find.found import Match
from normquant.compile.find.graph import (
    NotFound,
    Unsupported,
    asks_shape,
    aten,
    dtype,
    first_arg,
    is_call,
    is_narrowing,
    is_tensor,
    is_widening,
    keeps_order,
    op_name,
    peel,
)
from normquant.compile.find.norm_ops import NAMES, read_norm
from normquant.compile.find.norms import Norm
from normquant.compile.find.outside_readers import check_inside, norms_outside
from normquant.compile.find.sites import find as find_sites
from normquant.spec import ACTIVATION_DTYPES, QuantSpec


@dataclass(frozen=True)
class ReducedNorm:
    """sums: the all-reduces that its norms read, which compute one value. residual: what is added to that, None where
    nothing is. passed: the nodes between them and the norm that are gone with them."""

    match: Match
    sums: tuple[AllReduce, ...]
    residual: Node | None
    passed: frozenset[Node] = frozenset()

    @property
    def sum(self) -> AllReduce:
        return self.sums[0]

    @property
    def totals(self) -> tuple[Node, ...]:
        """The nodes that hold the sum of everything in the activation dtype."""
        return tuple(one.result for one in self.sums) if self.residual is None else self.match.sums

    @property
    def made(self) -> frozenset[Node]:
        """The nodes whose values the op makes."""
        return self.match.results.union(self.totals)

    @property
    def inner(self) -> frozenset[Node]:
        """The nodes that are gone once the site is one op."""
        return self.match.inner | self.passed

    def checked(self, regions: dict[Node, int]) -> ReducedNorm:
        """The site with what is read of its norm. Raises Unsupported where something inside is read by others."""
        match = replace(self.match, norms=norms_outside(self.match, self.match.inner))
        check_inside(match, match.inner | match.results)
        found = replace(self, match=match, passed=_passed(self))
        nodes = found.inner | found.made | {node for one in self.sums for node in (one.call, one.result)}
        if len({regions[node] for node in nodes}) > 1:
            raise Unsupported("a tensor is changed in place between it and the norm")
        return found


def find(graph: Graph) -> list[tuple[ReducedNorm, str]]:
    """Each all-reduce in front of a norm, in the order of the graph, and why it has to stay, "" where it has not.

    Of several norms of one sum the first that is quantized is found, or else the first; the others can read the sum.
    """
    if not any_all_reduce(graph):
        return []
    values, found = Values(graph), dict[Node, ReducedNorm]()
    for match in (*find_sites(graph).matches, *_lone_norms(graph, values)):
        if (site := _read(match)) is not None:
            found.setdefault(site.sum.result, site)
    return [_checked(found[result], values) for result in sorted(found)]


def _checked(site: ReducedNorm, values: Values) -> tuple[ReducedNorm, str]:
    try:
        return site.checked(values.regions), ""
    except Unsupported as reason:
        return site, str(reason)


def norms_of_sums(graph: Graph) -> set[Node]:
    """The values of the norms that read a sum over ranks."""
    return {y for site, _ in find(graph) for y in site.match.ys}


def _lone_norms(graph: Graph, values: Values) -> Iterator[Match]:
    """Every norm in the activation dtype, as a site without a quantization."""
    for node in graph.nodes:
        if not (is_tensor(node) and dtype(node) in ACTIVATION_DTYPES and _may_end_a_norm(node)):
            continue
        try:
            norm = read_norm(node, values)
        except (NotFound, Unsupported):
            continue
        total = norm.addition.sum if norm.addition else "fp32"
        yield Match((norm,), (), QuantSpec(rounding=norm.rounding, sum=total), (node,))


def _may_end_a_norm(node: Node) -> bool:
    return is_narrowing(node) or is_call(node, aten.mul.Tensor) or op_name(node) in NAMES


def _read(match: Match) -> ReducedNorm | None:
    """The site of a norm whose sum over ranks nothing else reads, or else the one that comes last; None where the norm
    reads none."""
    sites = [
        ReducedNorm(match, sums, residual)
        for sums, residual in ((_sums(match, choice), _residual(match.norm, choice)) for choice in range(3))
        if sums
    ]
    for site in sorted(sites, key=lambda site: site.sum.result, reverse=True):
        try:
            _passed(site)
        except Unsupported:
            continue
        return site
    return max(sites, key=lambda site: site.sum.result, default=None)


def _choices(norm: Norm) -> tuple[tuple[Node | None, Node | None], ...]:
    """(what may be a sum over ranks, what is added to it): either addend, or what the norm reads."""
    addends = (None, None) if norm.addition is None else (norm.addition.x, norm.addition.residual)
    return (addends, addends[::-1], (norm.x, None))


def _sums(match: Match, choice: int) -> tuple[AllReduce, ...]:
    """The all-reduces of all norms of a match, none where one of them has none."""
    ends = [_choices(norm)[choice][0] for norm in match.same]
    found = [None if end is None else read_all_reduce(peel(end, keeps_order)) for end in ends]
    return tuple(dict.fromkeys(one for one in found if one is not None)) if None not in found else ()


def _residual(norm: Norm, choice: int) -> Node | None:
    return _choices(norm)[choice][1]


def _passed(site: ReducedNorm) -> frozenset[Node]:
    """The nodes from the all-reduce to the residual add. Raises Unsupported where something else reads them: the op
    makes the sum with the residual, not the one without."""
    if site.residual is None:
        return frozenset()
    totals = site.match.sums
    ends = {*site.match.inner, *totals, *(first_arg(total) for total in totals if is_narrowing(total))}
    passed: set[Node] = set()
    pending = [one.result for one in site.sums]
    while pending:
        node = pending.pop()
        passed.add(node)
        for user in node.users:
            if user in ends or asks_shape(user, site.sum.part):
                continue
            if not (is_tensor(user) and (keeps_order(user) or is_widening(user))):
                raise Unsupported(f"its result is also read by {op_name(user)} ({user.name}), without the residual")
            pending.append(user)
    return frozenset(passed)
