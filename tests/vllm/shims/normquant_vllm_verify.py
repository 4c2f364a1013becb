"""Compare every site of vLLM's real graphs with the fused op, to the bit, on inputs whose sums of squares are exact.

Each site is run alone: its inputs are made up, the operations between them and its results run eagerly as the graph
has them, and the fused op runs on the same inputs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from normquant.compile import driver, verify
from normquant.compile.driver import site_name
from normquant.compile.find.found import Match
from normquant.compile.find.sites import find
from normquant.compile.fusions import latent_norm_quant
from normquant.compile.fusions.norm_quant import Rewriter

ROWS = 5


def install(out: str) -> None:
    original = driver.run
    if getattr(original, "verifies", False):
        return

    fuse_latents = latent_norm_quant.fuse_latents

    def run(graph: Graph, *args: Any) -> Any:
        copy = copied(graph)
        write(out, (compare(copy, match) for match in find(copy).matches))
        return original(graph, *args)

    def run_latents(graph: Graph, *args: Any) -> Any:
        found = latent_norm_quant.find_latents(copied(graph))
        write(out, (compare_latents(latents) for latents in found if isinstance(latents, latent_norm_quant.Latents)))
        return fuse_latents(graph, *args)

    run.verifies = True  # type: ignore[attr-defined]
    driver.run, latent_norm_quant.fuse_latents = run, run_latents


def copied(graph: Graph) -> Graph:
    copy = Graph(graph.owning_module)
    copy.output(copy.graph_copy(graph, {}))
    return copy


def write(out: str, comparisons: Iterable[verify.SiteComparison]) -> None:
    with unset_fake_temporarily(), torch.no_grad(), Path(out, "sites.jsonl").open("a") as file:
        for comparison in comparisons:
            file.write(json.dumps(asdict(comparison)) + "\n")


def compare(graph: Graph, match: Match) -> verify.SiteComparison:
    add = Rewriter(graph).adds(match)
    addition, k = match.norm.addition, match.norm.k
    inputs = (addition.x, addition.residual) if add and addition else match.norm.sources
    values: dict[Node, Any] = {node: exact(ROWS, k, seed=i) for i, node in enumerate(inputs)}
    values[match.norm.weight] = exact(k, seed=len(inputs)) + 0.5
    for node in verify._wanted(match):
        evaluate(node, values)
    return verify._compare(match, add, values)


def compare_latents(found: latent_norm_quant.Latents) -> verify.SiteComparison:
    q, kv, k_pe = found.q.norm, found.kv, found.k_pe
    angles = torch.randn(k_pe.cache.meta["val"].shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    width = found.base.meta["val"].shape[-1]
    values: dict[Node, Any] = {
        found.base: exact(ROWS, width, seed=0),
        q.weight: exact(q.k, seed=1) + 0.5,
        kv.weight: exact(kv.k, seed=2) + 0.5,
        k_pe.cache: angles,
        k_pe.positions: torch.arange(ROWS) * 3 + 1,
    }
    x, q_weight, kv_weight, cache, positions = values.values()
    cos, sin = cache.chunk(2, dim=-1)
    op = torch.ops.normquant.latent_norm_quant
    given = op(x, q_weight, kv_weight, cos, sin, positions, q.eps, k_pe.rope, found.spec.encode())
    (quant,) = found.q.quants
    counts: list[list[int]] = [[0, 0], [0, 0], [0, 0]]
    for i, (node, output) in enumerate(zip((quant.data, quant.scale, kv.y, k_pe.y), given, strict=True)):
        verify._count(counts[min(i, 2)], evaluate(node, values), output)
    return verify.SiteComparison(site_name(found.q), "latent_norm_quant", *counts[0], *counts[1], *counts[2])


def evaluate(node: Node, values: dict[Node, Any]) -> Any:
    """What a node computes, from the values that are there; a symbolic size is the number of rows."""
    if node not in values:
        if node.op == "placeholder":
            assert isinstance(node.meta["val"], torch.SymInt), f"{node.name} is needed and was not made up"
            values[node] = ROWS
        else:
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: evaluate(n, values))
            values[node] = node.target(*args, **kwargs)
    return values[node]


def exact(*shape: int, seed: int) -> torch.Tensor:
    """Multiples of 1/4 up to 2: sums of their squares, and of the squares of sums of two of them, are exact in fp32."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-8, 9, shape, generator=generator) / 4).to(torch.bfloat16)
