"""Fuse silu(gate) * up with the opaque quantization that reads it, as vLLM's MLP has them.

    x = [gate, up]                              [M, 2K] bf16 or fp16
    y = round(round(silu(gate)) * up)           aten operations
    data, scale = quantization of y             one opaque operation

A gated product that Inductor generates and a quantization in aten operations need no help: they become one kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch.fx import Graph, Node

from normquant.compile.edit.build import Builder, Rewrite, call_in_place_of
from normquant.compile.find.graph import (
    Unsupported,
    arguments,
    aten,
    dtype,
    first_arg,
    is_call,
    is_narrowing,
    is_tensor,
    is_widening,
    mutation_regions,
    number,
    part,
    same_size,
    value,
)
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
    """One site. x: [..., 2K], gate first. k: K."""

    x: Node
    k: int
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
    replaced = call_in_place_of(new, anchor, results, op, gated.x, 2 * gated.k, gated.spec.encode())
    return Rewrite(replaced, like=anchor)


def _split_product(product: Node) -> tuple[Node, Node, set[Node]] | None:
    """gate, up and the nodes between them and a product silu(gate) * up; None for any other node."""
    if not is_call(product, aten.mul.Tensor):
        return None
    a, b = arguments(product)[:2]
    for silu, up in ((a, b), (b, a)):
        if is_tensor(silu) and is_tensor(up):
            inner = {product}
            gate = _gate(silu, inner)
            if gate is not None:
                return gate, up, inner
    return None


def _gate(silu: Node, inner: set[Node]) -> Node | None:
    """g of g / (1 + exp(-g)), computed in fp32 and rounded to g's dtype; the nodes on the way go into `inner`."""
    quotient = first_arg(silu) if is_narrowing(silu) else silu
    if not is_call(quotient, aten.div.Tensor):
        return None
    wide, total = arguments(quotient)[:2]
    if not (is_call(total, aten.add.Tensor) and sorted(map(str, map(number, arguments(total)))) == ["1.0", "None"]):
        return None
    power = next(arg for arg in arguments(total) if number(arg) is None)
    if not is_call(power, aten.exp.default) or not is_call(first_arg(power), aten.neg.default):
        return None
    if first_arg(first_arg(power)) is not wide or not is_widening(wide) or not is_narrowing(silu):
        return None
    gate = first_arg(wide)
    if dtype(gate) != dtype(silu):
        return None
    inner.update((silu, quotient, total, power, first_arg(power), wide))
    return gate


def _read(anchor: Node, product: Node, gate: Node, up: Node, inner: set[Node], regions: dict) -> GatedProduct:
    """The site in front of a quantization. Raises Unsupported for one that the kernel does not support."""
    k = value(product).shape[-1]
    if not isinstance(k, int):
        raise Unsupported(f"K is symbolic ({k}); the kernels need it as a constant")
    if dtype(product) not in ACTIVATION_DTYPES or dtype(up) != dtype(product):
        raise Unsupported(f"silu(gate) * up is computed in {dtype(product)}")
    quant = read(anchor, k)
    x = _halves(gate, up, k)
    inner |= {gate, up, *quant.inner}
    results = {quant.data, quant.scale}
    for node in inner - {gate, up}:
        outside = [user for user in node.users if user not in inner and user not in results and user.users]
        if outside:
            raise Unsupported(f"{node.name}, between gate and quantization, is also read by {outside[0].name}")
    if len({regions[node] for node in inner}) > 1:
        raise Unsupported("a tensor is changed in place between the gate and the quantization")
    gated = GatedProduct(x, k, quant)
    check_op("silu_mul_quant", rows_of(x, 2 * k), gated.spec)
    return gated


def _halves(gate: Node, up: Node, k: int) -> Node:
    """The tensor [..., 2K] whose halves gate and up are."""
    ends = [part(node) for node in (gate, up)]
    found = [end for end in ends if end is not None]
    if len(found) == 2 and found[0][0] is found[1][0] and same_size(value(found[0][0]).shape[-1], 2 * k):
        if [start for _, start in found] == [0, k]:
            return found[0][0]
        raise Unsupported("gate is not the first half of the tensor, or up not the second")
    raise Unsupported("gate and up are not the two halves of one tensor")
