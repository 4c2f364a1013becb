"""Compare every site of vLLM's real graphs with the fused op, to the bit, on inputs whose sums of squares are exact.

Each site is run alone: its inputs are made up, the operations between them and its results run eagerly as the graph
has them, and the fused op runs on the same inputs.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from normquant.compile import fusion_pass, verify
from normquant.compile.rewrite import Rewriter
from normquant.compile.sites import Match, find

ROWS = 5


def install(out: str) -> None:
    original = fusion_pass.run
    if getattr(original, "verifies", False):
        return

    def run(graph: Graph, *args: Any) -> Any:
        copy, nodes = Graph(graph.owning_module), {}
        copy.output(copy.graph_copy(graph, nodes))
        with unset_fake_temporarily(), torch.no_grad(), Path(out, "sites.jsonl").open("a") as file:
            for match in find(copy).matches:
                file.write(json.dumps(asdict(compare(copy, match))) + "\n")
        return original(graph, *args)

    run.verifies = True  # type: ignore[attr-defined]
    fusion_pass.run = run


def compare(graph: Graph, match: Match) -> verify.SiteComparison:
    add = Rewriter(graph).adds(match)
    addition, k = match.norm.addition, match.norm.k
    inputs = (addition.x, addition.residual) if add and addition else match.norm.sources
    values: dict[Node, Any] = {node: exact(ROWS, k, seed=i) for i, node in enumerate(inputs)}
    values[match.norm.weight] = exact(k, seed=len(inputs)) + 0.5
    for node in verify._wanted(match):
        evaluate(node, values)
    return verify._compare(match, add, values)


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
