"""Find the norm -> quant sites of a graph, by meaning: from each quantization back to the norm that feeds it.

A site is one norm and every quantization of it that asks for the same result. What stands in the way of fusing it is
found here as well: values inside of it that somebody else reads, and tensors that are changed on the way. `find`
changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import get_args

import torch
from torch.fx import Graph, Node

from normquant.compile.find import norm_ops, quant_ops, quants
from normquant.compile.find.described import described
from normquant.compile.find.duplicates import Values
from normquant.compile.find.found import Match, Rejected, anchor_of
from normquant.compile.find.graph import (
    FP8_DTYPES,
    NotFound,
    Unsupported,
    arguments,
    dtype,
    is_cast,
    is_tensor,
    op_name,
)
from normquant.compile.find.norms import Norm
from normquant.compile.find.outside_readers import check_inside, choose_layout, norms_outside
from normquant.compile.find.quants import Quant
from normquant.spec import Layout, QuantSpec

OPAQUE = "it is made inside of {}; expected aten operations, normquant.group_quant or an operation of vLLM's"
NEAR = 64  # nodes in front of a quantization, itself included, among which a norm is near
LAYOUTS = get_args(Layout)  # the least demanding first: a scale in columns can be read row by row


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
    reader = _Reader(Values(graph))
    for anchor in graph.nodes:
        if is_anchor(anchor):
            reader.read(anchor, pairs, found)
        elif is_opaque_quant(anchor):
            found.others.append(Rejected(anchor, OPAQUE.format(op_name(anchor))))
    if not pairs:
        return found
    matches = _group(pairs, reader)
    _reject_shared(matches, found)
    found.matches = _norms_once([match for match in matches if _checked(match, found, reader.values.regions)])
    return found


def is_anchor(node: Node) -> bool:
    """Whether a quantization to fp8 ends here."""
    if quant_ops.is_quant(node):
        return True
    return (
        is_cast(node) and is_tensor(node) and dtype(node) in FP8_DTYPES and dtype(arguments(node)[0]) not in FP8_DTYPES
    )


def is_opaque_quant(node: Node) -> bool:
    """Whether an operation of somebody else's makes fp8 values of others: a quantization that nothing is known of."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    foreign = node.target.namespace not in ("aten", "prims", "normquant", "normquant_vllm")
    return foreign and _has_fp8(node) and not any(map(_has_fp8, node.all_input_nodes))


def _has_fp8(node: Node) -> bool:
    made = torch.utils._pytree.tree_leaves(node.meta.get("val"))
    return any(isinstance(t, torch.Tensor) and t.dtype in FP8_DTYPES for t in made)


class _Reader:
    """Reads quantizations and the norms in front of them, each norm once."""

    def __init__(self, values: Values) -> None:
        self.values = values
        self.norms: dict[Node, Norm | Unsupported | NotFound] = {}  # what the nodes that were asked hold

    def read(self, anchor: Node, pairs: list, found: Found) -> None:
        """Read one quantization and the norm in front of it."""
        norm = None
        try:
            arithmetic = quants.read_arithmetic(anchor, self.values) if is_cast(anchor) else None
            norm = self.norm_of(arithmetic.y if arithmetic else quant_ops.quantized(anchor))
            quant = quants.complete(arithmetic, norm.k) if arithmetic else quant_ops.read(anchor, norm.k)
            pairs.append((anchor, norm, quant))
        except NotFound as reason:
            found.others.append(Rejected(anchor, str(reason)))
        except Unsupported as reason:
            near_norm = norm is not None or _follows_norm(anchor)
            (found.rejected if near_norm else found.others).append(Rejected(anchor, str(reason), norm))

    def norm_of(self, y: Node) -> Norm:
        """The norm whose value is y. Raises NotFound or Unsupported where there is none that can be fused."""
        norm = self.norm_or_reason(y)
        if isinstance(norm, Norm):
            return norm
        raise norm

    def norm_or_reason(self, y: Node) -> Norm | Unsupported | NotFound:
        if y not in self.norms:
            try:
                self.norms[y] = norm_ops.read_norm(y, self.values)
            except Unsupported as reason:
                self.norms[y] = reason
            except NotFound:
                self.norms[y] = NotFound(f"its input is {described(y)}, not an RMSNorm")
        return self.norms[y]


def _follows_norm(anchor: Node) -> bool:
    """Whether an rsqrt or sqrt is among the last few operations before a quantization that could not be read."""
    pending, seen = [anchor], {anchor}
    while pending and len(seen) < NEAR:
        for node in pending.pop(0).all_input_nodes:
            name = op_name(node)
            if name in ("aten.rsqrt", "aten.sqrt", *norm_ops.NAMES):
                return True
            if node not in seen and name.startswith(("aten.", "prims.")):
                seen.add(node)
                pending.append(node)
    return False


def _group(pairs: list[tuple[Node, Norm, Quant]], reader: _Reader) -> list[Match]:
    """One match for each norm and arithmetic, whose scales are in the layout of its most demanding quantization."""
    groups: dict[tuple[tuple[Norm, ...], int, QuantSpec], list[Quant]] = {}
    for anchor, norm, quant in pairs:
        written = [reader.norm_or_reason(y) for y in reader.values.equal.get(norm.y, [norm.y])]
        same = tuple(other for other in written if isinstance(other, Norm))
        spec = _with_norm(quant.spec, same[0])
        by_row = spec if spec.scale == "ue8m0_packed" else spec.replace(layout="row")
        groups.setdefault((same, reader.values.regions[anchor], by_row), []).append(quant)
    return [_match(norms, quants) for (norms, *_), quants in groups.items()]


def _match(norms: Sequence[Norm], quants: Sequence[Quant]) -> Match:
    """A norm, computed once or again, and quantizations of it that differ in nothing but the layout of the scales."""
    layout = max(map(_layout, quants), key=LAYOUTS.index)
    return Match(tuple(norms), tuple(quants), _with_norm(quants[0].spec, norms[0]).replace(layout=layout))


def _layout(quant: Quant) -> Layout:
    if quant.scale is None or quant.scale_form is None:
        return quant.spec.layout
    return choose_layout(quant.scale, quant.scale_form, quant.inner)


def _with_norm(spec: QuantSpec, norm: Norm) -> QuantSpec:
    return spec.replace(rounding=norm.rounding, sum=norm.addition.sum if norm.addition else "fp32")


def _apart(match: Match) -> list[Match]:
    """A match for each of the norms that are quantized, where computing them once is not possible."""
    quants = [(norm, [quant for quant in match.quants if quant.y is norm.y]) for norm in match.same]
    return [_match([norm], found) for norm, found in quants if found]


def _norms_once(matches: Sequence[Match]) -> list[Match]:
    """The matches, the norm for other readers coming out of the first one of each norm."""
    made: set[Node] = set()
    once: list[Match] = []
    for match in matches:
        once.append(replace(match, norms=()) if match.norm.y in made else match)
        made.add(match.norm.y)
    return once


def _reject_shared(matches: list[Match], found: Found) -> None:
    """Drop the matches whose inside is read by something that stays, until no such match is left."""
    while True:
        gone = frozenset[Node]().union(*(match.inner for match in matches))
        results = frozenset[Node]().union(*(match.results for match in matches))
        for i, match in enumerate(matches):
            try:
                matches[i] = replace(match, norms=norms_outside(match, gone))
                check_inside(match, gone | results)
            except Unsupported as reason:
                if len(match.same) > 1:
                    matches[i : i + 1] = _apart(match)
                else:
                    found.rejected.append(Rejected(anchor_of(match), str(reason), match.norm))
                    del matches[i]
                break
        else:
            return


def _checked(match: Match, found: Found, regions: dict[Node, int]) -> bool:
    """Whether nothing is changed in place inside of the site."""
    try:
        nodes = match.inner | match.results | _passed(match)
        if len({regions[node] for node in nodes}) > 1:
            raise Unsupported("a tensor is changed in place between the norm and the quantization")
    except Unsupported as reason:
        found.rejected.append(Rejected(anchor_of(match), str(reason), match.norm))
        return False
    return True


def _passed(match: Match) -> set[Node]:
    """The casts, views and copies between the inside of the norm and what the op will read."""
    ends = {node for norm in match.same for node in (norm.weight, norm.eps, *norm.sources, *norm.again)}
    passed: set[Node] = set()
    pending = [node for norm in match.same for node in norm.inner]
    while pending:
        for node in pending.pop().all_input_nodes:
            if node not in ends and node not in match.inner and node not in passed and node.op == "call_function":
                passed.add(node)
                pending.append(node)
    return passed
