"""Fuse silu(gate) * up with the opaque quantization that reads it, as vLLM's MLP has them.

    x = [gate, up]                              [M, 2K] bf16 or fp16
    y = round(round(silu(gate)) * up)           aten operations
    data, scale = quantization of y             one opaque operation

A gated product that Inductor generates and a quantization in aten operations need no help: they become one kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from normquant.compile.driver import hint, module_path, source_line
from normquant.compile.edit.build import replace_results
from normquant.compile.find.columns import part
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
    same_size,
    value,
)
from normquant.compile.find.quant_ops import is_quant, quantized, read
from normquant.compile.find.quants import Quant
from normquant.compile.find.sites import rows_are_even
from normquant.compile.policy import Facts, Rules
from normquant.compile.report import Site
from normquant.spec import ACTIVATION_DTYPES, QuantSpec


@dataclass(frozen=True)
class Gated:
    """One site. x: [..., 2K], gate first. k: K. inner: the nodes from x to the quantization."""

    x: Node
    k: int
    quant: Quant
    inner: frozenset[Node]

    @property
    def spec(self) -> QuantSpec:
        return self.quant.spec.replace(rounding="twice")


def fuse_silu_quant(graph: Graph, rules: Rules) -> tuple[Site, ...]:
    """Rewrite every site that the rules want fused; returns all sites, fused or not. Dead nodes are taken out."""
    sites = []
    regions = mutation_regions(graph)
    for anchor in [node for node in graph.nodes if is_quant(node)]:
        product = quantized(anchor)
        gated = _split_product(product)
        if gated is not None:
            sites.append(_treat(graph, anchor, product, gated, rules, regions))
    if any(site.fused for site in sites):
        graph.eliminate_dead_code()
    return tuple(sites)


def _treat(
    graph: Graph, anchor: Node, product: Node, gated: tuple[Node, Node, set[Node]], rules: Rules, regions: dict
) -> Site:
    name = module_path(product) or product.name
    where = source_line(product, anchor)
    try:
        site = _read(anchor, product, *gated, regions)
    except Unsupported as reason:
        return Site(name, where, "stock", str(reason))
    x = value(site.x)
    rows = x.numel() // (2 * site.k)
    facts: dict[str, Any] = {"m": str(rows), "k": site.k, "dtype": str(x.dtype)[6:], "spec": site.spec.encode()}
    m = rows if isinstance(rows, int) else None
    decided = rules.decide(name, Facts(x.device, "silu_mul_quant", m, site.k, opaque_norm=False))
    if decided.strategy != "fused":
        return Site(name, where, "stock", decided.reason, **facts)
    op = torch.ops.normquant.silu_mul_quant.default
    replace_results(graph, anchor, (site.quant.data, site.quant.scale), op, site.x, 2 * site.k, site.spec.encode())
    saved = (hint(rows) if m is None else m) * site.k * x.dtype.itemsize * 2  # y is neither written nor read
    return Site(name, where, "fused", decided.reason, op="silu_mul_quant", bytes_saved=saved, kernels_saved=1, **facts)


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


def _read(anchor: Node, product: Node, gate: Node, up: Node, inner: set[Node], regions: dict) -> Gated:
    """The site in front of a quantization. Raises Unsupported when the kernel does not have it."""
    k = value(product).shape[-1]
    if not isinstance(k, int):
        raise Unsupported(f"K is symbolic ({k}); the kernels need it as a constant")
    if dtype(product) not in ACTIVATION_DTYPES or dtype(up) != dtype(product):
        raise Unsupported(f"silu(gate) * up is computed in {dtype(product)}")
    quant = read(anchor, k)
    x = _halves(gate, up, k)
    inner |= {gate, up, *quant.inner}
    if not rows_are_even(value(x), 2 * k) or value(x).stride(-1) != 1:
        raise Unsupported(f"gate and up lie in a tensor of stride {tuple(value(x).stride())}; its rows are not even")
    results = {quant.data, quant.scale}
    for node in inner - {gate, up}:
        outside = [user for user in node.users if user not in inner and user not in results and user.users]
        if outside:
            raise Unsupported(f"{node.name}, between gate and quantization, is also read by {outside[0].name}")
    if len({regions[node] for node in inner}) > 1:
        raise Unsupported("a tensor is changed in place between the gate and the quantization")
    return Gated(x, k, quant, frozenset(inner))


def _halves(gate: Node, up: Node, k: int) -> Node:
    """The tensor [..., 2K] whose halves gate and up are."""
    ends = [part(node) for node in (gate, up)]
    found = [end for end in ends if end is not None]
    if len(found) == 2 and found[0][0] is found[1][0] and same_size(value(found[0][0]).shape[-1], 2 * k):
        if [start for _, start in found] == [0, k]:
            return found[0][0]
        raise Unsupported("gate is not the first half of the tensor, or up not the second")
    raise Unsupported("gate and up are not the two halves of one tensor")
