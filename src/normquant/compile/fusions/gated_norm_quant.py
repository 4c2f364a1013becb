"""Fuse norm(x) * silu(z) of every head with the opaque quantization that reads it, as gated delta nets have it.

    n = norm of each head of x, weighted        x, z [..., D] or [..., H, D] bf16 or fp16, in memory [M, H * D]
    y = round(n * silu(z))                      aten operations, the product in fp32
    data, scale = quantization of y [M, H * D]  one opaque operation

A gated norm and a quantization in aten operations need no help. Other gated norms stay: a gate in front of the norm, as
in state space models, makes another norm, of whole rows; a sigmoid is another gate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.fx import Graph, Node

from normquant.compile.edit.build import Builder, Rewrite, as_row, as_rows, call_in_place_of
from normquant.compile.find.duplicates import Values
from normquant.compile.find.gates import silu
from normquant.compile.find.graph import (
    NotFound,
    Unsupported,
    dtype,
    factors,
    first_arg,
    is_narrowing,
    is_widening,
    mutation_regions,
    same_shape,
    value,
)
from normquant.compile.find.norm_ops import read_norm
from normquant.compile.find.norms import Norm
from normquant.compile.find.outside_readers import check_unread
from normquant.compile.find.quant_ops import is_quant, quantized, read, source
from normquant.compile.find.quants import Quant
from normquant.compile.fusions.acceptance import check_op, row_of, rows_of
from normquant.compile.fusions.candidate import Candidate, Findings, rejected, rows_seen, site_name, source_line
from normquant.spec import QuantSpec


@dataclass(frozen=True)
class Gate:
    """y = round(n * silu(z)). normed: n, as it was rounded. wide: z in fp32. inner: the nodes from y back to both."""

    y: Node
    normed: Node
    wide: Node
    inner: frozenset[Node]

    @property
    def z(self) -> Node:
        return first_arg(self.wide)


@dataclass(frozen=True)
class GatedNorm:
    """One site. x: [..., D] or [..., H, D], like z; k: H * D."""

    norm: Norm
    x: Node
    z: Node
    k: int
    quant: Quant

    @property
    def spec(self) -> QuantSpec:
        return self.quant.spec.replace(rounding=self.norm.rounding)


def find(graph: Graph) -> Findings:
    """Every quantization of a norm(x) * silu(z)."""
    regions, values = mutation_regions(graph), Values(graph)
    for anchor in [node for node in graph.nodes if is_quant(node)]:
        gate = _gate(quantized(anchor))
        if gate is None:
            continue
        name, where = site_name(gate.y), source_line(gate.y, anchor)
        try:
            site = _read(anchor, gate, read_norm(gate.normed, values), regions)
        except NotFound:
            continue
        except Unsupported as reason:
            yield rejected(name, where, str(reason), told=anchor)
            continue
        x = value(site.x)
        rows, fuse = x.numel() // site.k, partial(_fuse, anchor, site)
        gated_bytes = rows_seen(rows) * site.k * x.dtype.itemsize  # neither written nor read again
        traffic = {"bytes_saved": 2 * gated_bytes, "kernels_saved": 1}
        yield Candidate(name, where, "gated_norm_quant", x, rows, site.k, site.spec, fuse, traffic=traffic, told=anchor)


def _fuse(anchor: Node, site: GatedNorm, new: Builder) -> Rewrite:
    norm, packet = site.norm, torch.ops.normquant.gated_norm_quant
    op = packet.tensor if isinstance(norm.eps, Node) else packet.default
    with new.before(anchor):
        args = as_rows(new, site.z, site.k), as_row(new, norm.weight, norm.k), norm.eps, site.spec.encode()
    results = site.quant.data, site.quant.scale
    return Rewrite(call_in_place_of(new, anchor, results, op, site.x, site.k, *args), like=site.norm.y)


def _gate(y: Node) -> Gate | None:
    """The gate of a node round(n * silu(z)); None for any other node."""
    product = first_arg(y) if is_narrowing(y) else y
    if product is y:
        return None
    for normed, activated in factors(product):
        found = silu(activated)
        if found is not None and is_widening(found.wide):
            inner = {y, product, *found.inner}
            if is_widening(normed):
                inner.add(normed)
                normed = first_arg(normed)
            return Gate(y, normed, found.wide, frozenset(inner))
    return None


def _read(anchor: Node, gate: Gate, norm: Norm, regions: dict[Node, int]) -> GatedNorm:
    """The site in front of a quantization. Raises Unsupported for one that the kernel does not support."""
    k = value(source(anchor)).shape[-1]
    if not isinstance(k, int):
        raise Unsupported(f"K is symbolic ({k}); the kernels need it as a constant")
    if norm.x is None:
        raise Unsupported("the gated norm is of an unrounded sum")
    if norm.weight_offset:
        raise Unsupported(f"the gated norm has {norm.weight_offset} + weight; the kernel has the weight alone")
    shapes = value(gate.z).shape, value(gate.y).shape
    if not same_shape(*shapes) or {dtype(gate.z), dtype(gate.y)} != {norm.dtype}:
        raise Unsupported(f"the gate is {dtype(gate.z)} {tuple(shapes[0])}, and what it gates {tuple(shapes[1])}")
    site = GatedNorm(norm, norm.x, gate.z, k, read(anchor, k))
    _check_inside(gate, site, regions)
    eps = 1.0 if isinstance(norm.eps, Node) else norm.eps  # an input of the graph says nothing until it runs
    check_op("gated_norm_quant", rows_of(site.x, k), rows_of(site.z, k), row_of(norm.weight, norm.k), eps, site.spec)
    return site


def _check_inside(gate: Gate, site: GatedNorm, regions: dict[Node, int]) -> None:
    """Raise Unsupported where something else reads what would be gone, or a tensor is changed on the way."""
    quant, norm = site.quant, site.norm
    inner = gate.inner | norm.inner | quant.inner | {norm.y}
    check_unread(inner, {quant.data, quant.scale}, "inside of the gated norm")
    ends = [site.x, site.z, norm.weight, norm.eps]
    if len({regions[node] for node in inner.union(_between(gate.y, ends))}) > 1:
        raise Unsupported("a tensor is changed in place between the norm and the quantization")


def _between(y: Node, ends: Sequence[object]) -> Iterator[Node]:
    """y, and what it is computed of, up to the ends."""
    pending, seen = [y], {y}
    while pending:
        node = pending.pop()
        yield node
        above = [each for each in node.all_input_nodes if each not in ends and each not in seen]
        seen.update(above)
        pending += above
