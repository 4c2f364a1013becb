"""A norm, with a residual add in front of it or without, and every quantization of it: one op."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch.fx import Graph, Node

from normquant.compile.edit.build import Builder, Rewrite, as_row, as_rows, laid_out, rebuild, shaped
from normquant.compile.edit.decompose import decompose
from normquant.compile.find.found import Match, Rejected, anchor_of
from normquant.compile.find.graph import (
    Unsupported,
    asks_shape,
    dtype,
    first_arg,
    is_view,
    keeps_order,
    op_name,
    peel,
    rows_are_even,
    value,
)
from normquant.compile.find.norm_ops import is_norm_op
from normquant.compile.find.norms import Norm
from normquant.compile.find.outside_readers import sinks
from normquant.compile.find.quant_ops import is_quant
from normquant.compile.find.sites import find as find_sites
from normquant.compile.fusions.acceptance import check_op, row_of, rows_of
from normquant.compile.fusions.candidate import (
    Candidate,
    Findings,
    Rejection,
    bytes_of,
    module_path,
    rejected,
    rows_seen,
    site_name,
    source_line,
)
from normquant.compile.fusions.group_quant import lone_quantization
from normquant.spec import QuantSpec

# aten operations that run as library calls
EXTERN = {
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "convolution",
    "_scaled_mm",
    "_scaled_grouped_mm",
    "_grouped_mm",
    "index_put",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
}


def find(graph: Graph, left: Collection[Node] = (), why: str = "") -> Findings:
    """Every norm with a quantization of it, and every quantization that no norm feeds. left, why: norms that stay."""
    found, rewriter = find_sites(graph), NormQuantRewriter()
    yield from map(_rejection, found.rejected)
    for match in found.matches:
        stays = match.norm.y in left
        yield _rejection(Rejected(anchor_of(match), why, match.norm)) if stays else _candidate(match, rewriter)
    yield from map(lone_quantization, found.others)


def _rejection(found: Rejected) -> Rejection:
    norm = found.norm
    known: dict[str, Any] = {"k": norm.k, "dtype": str(norm.dtype)[6:]} if norm else {}
    name = module_path(norm.y if norm else found.anchor) or found.anchor.name
    return rejected(name, source_line(found.anchor, norm.y if norm else None), found.reason, **known)


def norm_name(match: Match) -> str:
    """The norm's module path, or the name of its node where no module made it."""
    return site_name(match.norm.y, *match.norm.inner)


def is_opaque(norm: Norm) -> bool:
    """Whether the norm is one operation that the compiler calls."""
    return any(is_norm_op(node) for node in (norm.y, *norm.inner))


def _candidate(match: Match, rewriter: NormQuantRewriter) -> Candidate | Rejection:
    norm, add = match.norm, rewriter.adds(match)
    try:
        rewriter.check(match, add)
    except Unsupported as reason:
        return _rejection(Rejected(anchor_of(match), str(reason), norm))
    x = value(norm.sources[0])
    rows = x.numel() // norm.k
    return Candidate(
        norm_name(match),
        source_line(anchor_of(match), norm.y),
        fused_op(match, add)._opname,
        x,
        rows,
        norm.k,
        op_spec(match, add),
        fuse=partial(rewriter.fuse, match, add),
        native=partial(_make_native, match),
        traffic=_traffic(match, add, rows),
        opaque_norm=is_opaque(norm),
        extra_kernel=_takes_extra_kernel(match),
    )


def _takes_extra_kernel(match: Match) -> bool:
    """Whether the weight is computed in the graph, or what is normed is a copy, and nothing opaque in the site has a
    kernel that goes in return."""
    norm = match.norm
    computed = norm.weight.op == "call_function" and not in_memory(norm.weight)
    copied = any(_is_copy(node, norm.k) for node in norm.sources)
    return (computed or copied) and not any(is_quant(node) for node in match.inner)


def _is_copy(node: Node, k: int) -> bool:
    """Whether a node has rows of k values evenly spaced that were not before."""
    return keeps_order(node) and not rows_are_even(value(first_arg(node)), k)


def _make_native(match: Match, new: Builder) -> Rewrite:
    """The opaque quantizations of a site as aten operations."""
    inside = {node for quant in match.quants for node in quant.inner if is_quant(node)}
    ops = [node for node in new.graph.nodes if node in inside]
    if not ops:
        return Rewrite(note="it was aten operations already")
    return Rewrite(decompose(new, ops), like=match.norm.y, note="the quantization is aten operations now")


def _traffic(match: Match, add: bool, rows: Any) -> dict[str, int]:
    """The bytes that one kernel has to move, and what that saves.

    The comparison is with the norm as one generated kernel that writes its result, and a kernel for each quantization
    that reads it.
    """
    norm, spec, m = match.norm, match.spec, rows_seen(rows)
    weight_bytes, normed = dtype(norm.weight).itemsize, bool(match.norms)
    moved = bytes_of(fused_op_name(match, add), m, norm.k, spec, weight_bytes=weight_bytes)
    tensor = m * norm.k * norm.dtype.itemsize
    saved = tensor * (len(match.quants) + (not normed)) + spec.bytes(m, norm.k) * (len(match.quants) - 1)
    kernels = len(match.quants) - sum(map(match.copies_scale, match.quants))
    return {"bytes_moved": moved, "bytes_saved": saved, "kernels_saved": kernels}


class NormQuantRewriter:
    """Rewrites the sites of one graph, one after the other; a site may read what another one made."""

    def __init__(self) -> None:
        self.replaced: dict[Node, Node] = {}  # what the nodes of the graph as it was are now

    def now(self, node: Node) -> Node:
        return self.replaced.get(node, node)

    def inputs(self, match: Match, add: bool) -> tuple[Node, ...]:
        """x, or both addends, and the weight."""
        addition, norm = match.norm.addition, match.norm
        sources = (addition.x, addition.residual) if add and addition else norm.sources
        return tuple(self.now(node) for node in (*sources, norm.weight))

    def adds(self, match: Match) -> bool:
        """Whether the residual add goes into the op.

        An unrounded sum exists nowhere else. A rounded one goes in where both addends lie in memory anyway: a kernel
        that computes one of them can add the other for less than the op, which would have to read it back.
        """
        addition = match.norm.addition
        if addition is None:
            return False
        if addition.sum == "fp32":
            return True
        if any(node in self.replaced for node in match.sums):
            return False  # an earlier site's op made the sum
        stored = all(in_memory(self.now(node)) for node in (addition.x, addition.residual))
        return stored and self.in_time(match, True) and self.accepted(match, True)

    def check(self, match: Match, add: bool) -> None:
        """Raise Unsupported where the op does not accept what it would get."""
        norm, (*sources, weight) = match.norm, self.inputs(match, add)
        rows = [rows_of(node, norm.k) for node in sources]
        eps = 1.0 if isinstance(norm.eps, Node) else norm.eps  # an input of the graph says nothing until it runs
        args = (*rows, row_of(weight, norm.k), eps, norm.weight_offset, op_spec(match, add))
        check_op(fused_op_name(match, add), *args)

    def accepted(self, match: Match, add: bool) -> bool:
        try:
            self.check(match, add)
        except Unsupported:
            return False
        return True

    def in_time(self, match: Match, add: bool) -> bool:
        """Whether everyone who would read the op's outputs comes after its inputs."""
        last = max(self.inputs(match, add))
        return all(last < reader for reader in _readers(match, add))

    def position(self, match: Match, add: bool) -> Node:
        """The first node, after the op's inputs, that reads what the op makes or is replaced by it."""
        last = max(self.inputs(match, add))
        return min(node for node in match.inner | _made(match, add) | _readers(match, add) if node > last)

    def fuse(self, match: Match, add: bool, new: Builder) -> Rewrite:
        """The fused op, whose outputs go to everyone who read the site's."""
        if not self.in_time(match, add):
            raise Unsupported("the weight is computed after the sum that the norm reads was used")
        norm = match.norm
        with new.before(self.position(match, add)):
            *sources, weight = self.inputs(match, add)
            rows = [as_rows(new, node, norm.k) for node in sources]
            args = (*rows, as_row(new, weight, norm.k), norm.eps, norm.weight_offset, op_spec(match, add).encode())
            op = new(fused_op(match, add), *args)
            outputs = [new(operator.getitem, op, i) for i in range(len(op.meta["val"]))]
            total, norm_again = outputs[2] if add else None, outputs[-1] if match.norms else None
            replaced = results_of(match, outputs[:2], total, norm_again, new)
        asking = ask_input_for_shape(match, self.now(norm.sources[0]), new)
        return Rewrite(tuple(replaced), asking, like=norm.y, committed=partial(self.replaced.update, replaced))


def _made(match: Match, add: bool) -> frozenset[Node]:
    return match.results.union(match.sums if add else ())


def _readers(match: Match, add: bool) -> set[Node]:
    return {user for node in _made(match, add) for user in node.users if user not in match.inner}


def ask_input_for_shape(match: Match, source: Node, new: Builder) -> tuple[tuple[Node, Node, Node], ...]:
    """(reader, old, new): a value that is asked for nothing but its shape must not be computed for that."""
    redirected = []
    for node in match.inner | match.results:
        for user in node.users:
            if asks_shape(user, source):
                with new.before(user):
                    redirected.append((user, node, shaped(new, source, node)))
    return tuple(redirected)


def results_of(
    match: Match, quantized: Sequence[Node], total: Node | None, norm: Node | None, new: Builder
) -> list[tuple[Node, Node]]:
    """(old, new) of everything that is read of a site, made of the outputs of its op.

    quantized: data and scale, or nothing where the site has no quantization. total, norm: None where the op has none.
    """
    pairs: list[tuple[Node, Node]] = []
    for quant in match.quants:
        data, scale = quantized
        if quant.data is not None:
            pairs.append((quant.data, data))
        if quant.scale is not None and quant.scale_form is None:
            copied = match.copies_scale(quant)
            pairs.append((quant.scale, laid_out(new, scale, quant.spec.layout) if copied else scale))
    pairs += [(node, norm) for node in match.norms if norm is not None]
    pairs += [(node, total) for node in match.sums if total is not None]
    placed = [(old, shaped(new, made, old)) for old, made in pairs]
    for quant in match.quants:
        if quant.scale is not None and quant.scale_form is not None:
            readers = sinks(quant.scale, quant.scale_form, quant.inner)
            placed += [(node, rebuild(new, quantized[1], node, form)) for node, form in readers]
    return placed


def op_spec(match: Match, add: bool) -> QuantSpec:
    """The spec of the site's op; without an add, `sum` says nothing and is left at its default."""
    return match.spec if add else match.spec.replace(sum=QuantSpec().sum)


def fused_op_name(match: Match, add: bool) -> str:
    """The op of a site, by name."""
    return ("add_" if add else "") + "rms_norm_quant" + ("_with_norm" if match.norms else "")


def fused_op(match: Match, add: bool) -> Any:
    """The op of a site."""
    packet = getattr(torch.ops.normquant, fused_op_name(match, add))
    return packet.tensor if isinstance(match.norm.eps, Node) else packet.default


def in_memory(node: Node) -> bool:
    """Whether a value is written to memory whatever happens: it comes from outside or from an operation that the
    compiler calls rather than generates, or somebody else reads it too."""
    node = peel(node, is_view)
    if node.op != "call_function" or len(node.users) > 1:
        return True
    made_by = op_name(node).split(".")
    return made_by[0] not in ("aten", "prims") or made_by[-1] in EXTERN
