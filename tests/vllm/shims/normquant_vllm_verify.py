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

from normquant.compile import driver
from normquant.compile.find.found import Match
from normquant.compile.find.sites import find
from normquant.compile.fusions import latent_norm_quant
from normquant.compile.fusions.norm_quant import NormQuantRewriter, fused_op, norm_name, op_spec
from normquant.compile.verify import Check, compare

ROWS = 5


def install(out: str) -> None:
    original = driver.run
    if getattr(original, "verifies", False):
        return

    def run(graph: Graph, *args: Any) -> Any:
        copy = copied(graph)
        found = latent_norm_quant.find_latents(copy)
        latents = [each for each in found if isinstance(each, latent_norm_quant.Latents)]
        taken = [each.q.norm.y for each in latents]
        write(out, (compare_latents(each) for each in latents))
        write(out, (compare_norm(match) for match in find(copy).matches if match.norm.y not in taken))
        return original(graph, *args)

    run.verifies = True  # type: ignore[attr-defined]
    driver.run = run


def copied(graph: Graph) -> Graph:
    copy = Graph(graph.owning_module)
    copy.output(copy.graph_copy(graph, {}))
    return copy


def write(out: str, checks: Iterable[Check]) -> None:
    with unset_fake_temporarily(), torch.no_grad(), Path(out, "sites.jsonl").open("a") as file:
        for check in checks:
            file.write(json.dumps(asdict(check)) + "\n")


def compare_norm(match: Match) -> Check:
    add, norm = NormQuantRewriter().adds(match), match.norm
    addition, k = norm.addition, norm.k
    sources = (addition.x, addition.residual) if add and addition else norm.sources
    values: dict[Node, Any] = {node: exact(ROWS, k, seed=i) for i, node in enumerate(sources)}
    values[norm.weight] = exact(k, seed=len(sources)) + 0.5
    inputs = [*values.values()]
    data, scale, *rest = fused_op(match, add)(*inputs, norm.eps, norm.weight_offset, op_spec(match, add).encode())
    read = [(node, made) for quant in match.quants for node, made in ((quant.data, data), (quant.scale, scale))]
    read += [(node, rest[-1]) for node in match.norms] + [(node, rest[0]) for node in match.sums if add]
    return compare(norm_name(match), "", ((evaluate(node, values), made) for node, made in read if node is not None))


def compare_latents(found: latent_norm_quant.Latents) -> Check:
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
    expected = [evaluate(node, values) for node in (quant.data, quant.scale, kv.y, k_pe.y)]
    pairs = ((e.reshape(g.shape), g) for e, g in zip(expected, given, strict=True))
    return compare(norm_name(found.q), "latent_norm_quant", pairs)


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
