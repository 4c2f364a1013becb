"""Fuse silu(gate) * up with the opaque quantization that reads it, as vLLM's MLP has them.

    x = [gate, up]                              [M, 2K] bf16 or fp16
    gate, up = min(gate, L), clamp(up, -L, L)   where the model has a limit: aten operations, as what follows
    y = round(round(silu(gate)) * up)
    data, scale = quantization of y             one opaque operation

A gated product that Inductor generates and a quantization in aten operations need no help: they become one kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch.fx import Graph, Node

from normquant.compile.edit.build import Builder, Rewrite, call_in_place_of
from normquant.compile.find.gates import Clamped, clamped, scaled_sigmoid, silu
from normquant.compile.find.graph import (
    Unsupported,
    dtype,
    factors,
    first_arg,
    is_narrowing,
    is_widening,
    mutation_regions,
    part,
    same_size,
    value,
)
from normquant.compile.find.outside_readers import check_unread
from normquant.compile.find.quant_ops import is_quant, quantized, read
from normquant.compile.find.quants import Quant
from normquant.compile.fusions.acceptance import check_op, rows_of
from normquant.compile.fusions.candidate import (
    Candidate,
    Findings,
    rejected,
    rows_seen,
    site_name,
    source_line,
)
from normquant.spec import ACTIVATION_DTYPES, QuantSpec


@dataclass(frozen=True)
class GatedProduct:
    """One site. x: [..., 2K], gate first. k: K. limit: of gate and up, None where they are not clamped."""

    x: Node
    k: int
    limit: float | None
    quant: Quant

    @property
    def spec(self) -> QuantSpec:
        return self.quant.spec.replace(rounding="twice")


def find(graph: Graph) -> Findings:
    """Every quantization of a product silu(gate) * up."""
    regions = mutation_regions(graph)
    for anchor in [node for node in graph.nodes if is_quant(node)]:
        product = quantized(anchor)
        split = _split_product(product)
        if split is None:
            if other := _other_silu(product):
                yield rejected(site_name(product), source_line(product, anchor), other)
            continue
        name, where = site_name(product), source_line(product, anchor)
        try:
            gated = _read(anchor, product, *split, regions)
        except Unsupported as reason:
            yield rejected(name, where, str(reason))
            continue
        x = value(gated.x)
        rows, k, fuse = x.numel() // (2 * gated.k), gated.k, partial(_fuse, anchor, gated)
        product_bytes = rows_seen(rows) * k * x.dtype.itemsize  # neither written nor read again
        traffic = {"bytes_saved": 2 * product_bytes, "kernels_saved": 1}
        yield Candidate(name, where, "silu_mul_quant", x, rows, k, gated.spec, fuse, traffic=traffic)


def _fuse(anchor: Node, gated: GatedProduct, new: Builder) -> Rewrite:
    op, results = torch.ops.normquant.silu_mul_quant.default, (gated.quant.data, gated.quant.scale)
    replaced = call_in_place_of(new, anchor, results, op, gated.x, 2 * gated.k, gated.limit, gated.spec.encode())
    return Rewrite(replaced, like=anchor)


def _split_product(product: Node) -> tuple[Node, Node, set[Node]] | None:
    """gate, up and the nodes between them and a product silu(gate) * up; None for any other node."""
    for narrow, up in factors(product):
        if is_narrowing(narrow) and (found := silu(first_arg(narrow))) and is_widening(found.wide):
            gate = first_arg(found.wide)
            if dtype(gate) == dtype(narrow):
                return gate, up, {product, narrow, found.wide, *found.inner}
    return None


def _other_silu(product: Node) -> str:
    """What keeps a product gate * sigmoid(gate) * up from being a site, "" for any other node."""
    for activated, _ in factors(product):
        scale = scaled_sigmoid(activated)
        if scale is not None and scale != 1:
            return f"its gate is g * sigmoid({scale} * g); the kernel has silu, g / (1 + exp(-g))"
        if scale is not None:
            rounded = str(dtype(activated)).removeprefix("torch.")
            return f"silu is g * sigmoid(g), whose sigmoid is rounded to {rounded}; the kernel rounds g / (1 + exp(-g))"
    return ""


def _read(anchor: Node, product: Node, gate: Node, up: Node, inner: set[Node], regions: dict) -> GatedProduct:
    """The site in front of a quantization. Raises Unsupported for one that the kernel does not support."""
    k = value(product).shape[-1]
    if not isinstance(k, int):
        raise Unsupported(f"K is symbolic ({k}); the kernels need it as a constant")
    if dtype(product) not in ACTIVATION_DTYPES or dtype(up) != dtype(product):
        raise Unsupported(f"silu(gate) * up is computed in {dtype(product)}")
    quant = read(anchor, k)
    first, second = clamped(gate), clamped(up)
    limit, x = _limit(first, second), _halves(first.x, second.x, k)
    inner |= quant.inner | first.inner | second.inner
    check_unread(inner, {quant.data, quant.scale}, "between gate and quantization")
    if len({regions[node] for node in inner | {first.x, second.x}}) > 1:
        raise Unsupported("a tensor is changed in place between the gate and the quantization")
    gated = GatedProduct(x, k, limit, quant)
    check_op("silu_mul_quant", rows_of(x, 2 * k), limit, gated.spec)
    return gated


def _limit(gate: Clamped, up: Clamped) -> float | None:
    """The limit of both, None where nothing is clamped. Raises Unsupported for other clamps than the kernel's."""
    given = (gate.low, gate.high), (up.low, up.high)
    if given == ((None, None), (None, None)):
        return None
    limit = gate.high
    if limit is None or given != ((None, limit), (-limit, limit)):
        within = [f"[{low}, {high}]".replace("None", "") for low, high in given]
        raise Unsupported(f"gate is clamped to {within[0]} and up to {within[1]}; the kernel has [, L] and [-L, L]")
    return limit


def _halves(gate: Node, up: Node, k: int) -> Node:
    """The tensor [..., 2K] whose halves gate and up are."""
    ends = [part(node) for node in (gate, up)]
    found = [end for end in ends if end is not None]
    if len(found) == 2 and found[0][0] is found[1][0] and same_size(value(found[0][0]).shape[-1], 2 * k):
        if [start for _, start in found] == [0, k]:
            return found[0][0]
        raise Unsupported("gate is not the first half of the tensor, or up not the second")
    raise Unsupported("gate and up are not the two halves of one tensor")
