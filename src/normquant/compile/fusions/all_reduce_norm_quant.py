"""An all-reduce, the residual add behind it, the norm, and the quantizations of that: one op of the group.

    all_reduce(x) -> add residual -> norm -> quantizations and readers of the norm

The residual add may be absent, and the quantizations. The op adds the parts of the ranks in rank order. No reduction of
NCCL's, vLLM's or FlashInfer's is known to, so that this changes the last bit of some sums, and is done only where an
option of its own asks for it. Every rank decides alike: by the graph, the options and what all ranks have in common.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.fx import Graph, Node

from normquant.compile.edit.build import Builder, Rewrite, as_row, as_rows, shaped
from normquant.compile.edit.sharded_sums import is_read_by, keep_with_owners
from normquant.compile.find.all_reduces import AllReduce, read_all_reduce
from normquant.compile.find.graph import Unsupported, arguments, is_call, value
from normquant.compile.find.quant_ops import functionalized
from normquant.compile.find.reduced_norms import ReducedNorm, find
from normquant.compile.fusion_report import Site
from normquant.compile.fusions.acceptance import row_of, rows_of
from normquant.compile.fusions.candidate import (
    Candidate,
    Findings,
    Rejection,
    bytes_of,
    rejected,
    rows_seen,
    site_name,
    source_line,
)
from normquant.compile.fusions.norm_quant import ask_input_for_shape, fused_op_name, is_opaque, norm_name, results_of
from normquant.distributed.group_facts import GroupFacts, facts_of, known_groups
from normquant.ops.all_reduce_add_rms_norm_quant import check, op_name

FLASHINFER = "vllm::flashinfer_trtllm_fused_allreduce_norm"
STAYS = "the all-reduce in front of it stays: "


@dataclass(frozen=True)
class AllReduceNormQuant:
    """The fusion.

    torch_name: torch's name of a group that the graph calls by another one; raises ValueError where it has none.
    off: why every site stays; "" where they may be fused. groups: what is known of them, for keys of compile caches.
    """

    torch_name: Callable[[str], str] = field(default=str, repr=False, compare=False)
    off: str = ""
    groups: Callable[[], Hashable] = field(default=known_groups, repr=False, compare=False)

    def identity(self) -> Hashable:
        """What decisions depend on besides the graph and the rules."""
        return self.off, self.groups()

    def __call__(self, graph: Graph) -> Findings:
        rewriter = _Rewriter()
        for site, reason in find(graph):
            try:
                if reason:
                    raise Unsupported(reason)
                yield self._candidate(site, rewriter)
            except Unsupported as problem:
                yield Rejection(_stays(site, str(problem)), site.sum.result)
        for node in [node for node in graph.nodes if functionalized(node) == FLASHINFER]:
            text = f"FlashInfer has its all-reduce and norm: {self.off or 'they were fused before this pass'}"
            yield rejected(site_name(node), source_line(node), text, node)

    def _candidate(self, site: ReducedNorm, rewriter: _Rewriter) -> Candidate:
        if self.off:
            raise Unsupported(self.off)
        facts, norm = self._facts(site.sum), site.match.norm
        rewriter.check(site)
        x = value(site.sum.part)
        rows = x.numel() // norm.k
        name = op_name(site.residual is not None, bool(site.match.quants), bool(site.match.norms))
        return Candidate(
            norm_name(site.match),
            _where(site),
            name,
            x,
            rows,
            norm.k,
            site.match.spec,
            fuse=partial(rewriter.fuse, site, facts.name),
            traffic=_traffic(site, rows),
            opaque_norm=is_opaque(norm),
            group=facts,
            stays=_stays(site, ""),
            lone=site.sum.result,
        )

    def _facts(self, sum_: AllReduce) -> GroupFacts:
        if sum_.reduce_op != "sum":
            raise Unsupported(f"its operation is {sum_.reduce_op!r}; the op computes a sum")
        try:
            facts = facts_of(self.torch_name(sum_.group))
        except ValueError as error:
            raise Unsupported(str(error)) from None
        if facts.ranks < 2:
            raise Unsupported(f"group {sum_.group!r} is one rank")
        return facts


def _stays(site: ReducedNorm, reason: str) -> Site:
    norm = site.match.norm
    known: dict[str, Any] = {"k": norm.k, "dtype": str(norm.dtype).removeprefix("torch.")}
    return Site(norm_name(site.match), _where(site), "stock", STAYS + reason, **known)


def _where(site: ReducedNorm) -> str:
    return source_line(*(quant.data or quant.y for quant in site.match.quants), site.match.norm.y)


def _traffic(site: ReducedNorm, rows: Any) -> dict[str, int]:
    """DRAM bytes of one rank, against the collective, which reads its part and writes the sum, and what reads that."""
    norm, match, m = site.match.norm, site.match, rows_seen(rows)
    add = site.residual is not None
    tensor = m * norm.k * norm.dtype.itemsize
    if not match.quants:
        return {"bytes_moved": (3 + add) * tensor, "bytes_saved": 2 * tensor, "kernels_saved": 1}
    moved = bytes_of(fused_op_name(match, add), m, norm.k, match.spec, weight_bytes=value(norm.weight).dtype.itemsize)
    normed = bool(match.norms)
    saved = tensor * (2 + len(match.quants) + (not normed)) + match.spec.bytes(m, norm.k) * (len(match.quants) - 1)
    return {"bytes_moved": moved, "bytes_saved": saved, "kernels_saved": 1 + len(match.quants)}


class _Rewriter:
    """Rewrites the sites of one graph, one after the other; a site may read what another one made."""

    def __init__(self) -> None:
        self.replaced: dict[Node, Node] = {}

    def inputs(self, site: ReducedNorm) -> tuple[Node, ...]:
        """This rank's part, the residual if there is one, and the weight, as the graph has them now."""
        given = (site.sum.part, site.residual, site.match.norm.weight)
        return tuple(self.replaced.get(node, node) for node in given if node is not None)

    def check(self, site: ReducedNorm) -> None:
        """Raise Unsupported where the op does not accept what it would get."""
        norm, (*sources, weight) = site.match.norm, self.inputs(site)
        if isinstance(norm.eps, Node):
            raise Unsupported("epsilon is an input of the graph; the ops of a group take a number")
        x, *residual = (rows_of(node, norm.k) for node in sources)
        if x.storage_offset() % 8:
            raise Unsupported(f"{sources[0].name} starts {x.storage_offset()} values into its memory; accepted: 8 n")
        args = (row_of(weight, norm.k), norm.eps, norm.weight_offset, site.match.spec)
        try:
            check(x, residual[0] if residual else None, *args)
        except ValueError as error:
            raise Unsupported(f"the op does not accept this: {error}") from None

    def fuse(self, site: ReducedNorm, group: str, new: Builder) -> Rewrite:
        """The op, whose outputs go to everyone who read the site's."""
        match, norm = site.match, site.match.norm
        *sources, weight = self.inputs(site)
        part = sources[0]
        with new.before(_position(site, max(*sources, weight))):
            rows = [as_rows(new, node, norm.k) for node in sources]
            sharded = all(is_read_by(total, site.inner | site.made) for total in site.totals)
            settings = (norm.eps, norm.weight_offset, sharded, group, match.spec.encode())
            op = new(_overload(site), *rows, as_row(new, weight, norm.k), *settings)
            outputs = [new(operator.getitem, op, i) for i in range(len(op.meta["val"]))]
            quantized, (total, *normed) = outputs[: 2 * bool(match.quants)], outputs[2 * bool(match.quants) :]
            replaced = results_of(match, quantized, total, normed[0] if normed else None, new)
            alone = total if site.residual is None else part  # of the sum without the residual nothing is left to read
            results = [(one.result, shaped(new, alone, one.result)) for one in site.sums]
        apart = [pair for one in site.sums for pair in _without(read_all_reduce(one.result), new)]
        kept = keep_with_owners(op, site.inner | site.made, new) if sharded else []
        return Rewrite(
            (*replaced, *results, *apart, *kept),
            ask_input_for_shape(match, part, new),
            like=norm.y,
            committed=partial(self._follow, {**dict(results), **dict(replaced)}, dict(kept)),
            erased=tuple(one.result for one in site.sums),
        )

    def _follow(self, replaced: dict[Node, Node], again: dict[Node, Node]) -> None:
        self.replaced |= replaced
        self.replaced = {old: again.get(new, new) for old, new in self.replaced.items()}


def _overload(site: ReducedNorm) -> Any:
    name = op_name(site.residual is not None, bool(site.match.quants), bool(site.match.norms))
    return getattr(torch.ops.normquant, name).default


def _position(site: ReducedNorm, last: Node) -> Node:
    """The first node, after the op's inputs, that reads what the op makes or is replaced by it."""
    readers = {user for node in site.made for user in node.users} - site.inner
    if early := sorted(reader for reader in readers - site.made if not last < reader):
        raise Unsupported(f"{early[0].name} reads its result before {last.name} is there, which the op needs")
    return min(node for node in site.inner | site.made | readers if node > last)


def _without(found: AllReduce | None, new: Builder) -> list[tuple[Node, Node]]:
    """(old, new) of what is left of a collective that reduces other tensors, too: one that does not have this one."""
    if found is None or len(found.parts) == 1:
        return []
    others = [part for i, part in enumerate(found.parts) if i != found.index]
    with new.before(found.call):
        call = new(found.call.target, others, *arguments(found.call)[1:])
        made = [new(operator.getitem, call, i) for i in range(len(others))]
    made.insert(found.index, found.part)  # in its place, and read by nobody
    return [(old, made[arguments(old)[1]]) for old in found.call.users if is_call(old, operator.getitem)]
