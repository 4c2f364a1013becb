"""Trace a function as torch.compile does, rewrite its graph, and run it eagerly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from shared.pass_harness import interpreting
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule
from torch.fx.node import map_arg

from normquant.compile import Site, driver
from normquant.compile.fusions.candidate import Fusion
from normquant.compile.policy import Rules


def rewrite(graph: Graph, fusion: Fusion, policy: Any = "always") -> tuple[Site, ...]:
    """What a fusion alone makes of a graph. policy: its name, or `Rules`."""
    rules = policy if isinstance(policy, Rules) else Rules(policy)
    return driver.run(graph, rules, strict=True, fusions=(fusion,)).sites


class Pass(CustomGraphPass):
    """A fusion that always fuses, as a pass of Inductor; its graphs are not cached."""

    def __init__(self, fusion: Fusion) -> None:
        self.fusion = fusion

    def __call__(self, graph: Graph) -> None:
        rewrite(graph, self.fusion)

    def uuid(self) -> None:
        return None


def run(
    rewrite: Callable[[Graph], tuple[Site, ...]], fn: Callable[..., Any], *args: torch.Tensor, dynamic: bool = False
) -> tuple[Any, list[Site], list[str]]:
    """What fn returns with its graph rewritten, the sites, and the operations left. dynamic: in dimension 0."""
    sites: list[Site] = []
    left: list[str] = []

    def change(gm: GraphModule) -> None:
        sites.extend(rewrite(gm.graph))
        left.extend(str(node.target) for node in gm.graph.nodes if node.op == "call_function")

    torch._dynamo.reset()
    if dynamic:
        for arg in args:
            torch._dynamo.mark_dynamic(arg, 0)
    with torch.no_grad(), torch._inductor.config.patch(enable_auto_functionalized_v2=False):  # as vLLM sets it
        return torch.compile(fn, backend=interpreting(change))(*args), sites, left


def traced(fn: Callable[..., Any], *args: torch.Tensor) -> tuple[GraphModule, tuple[torch.Tensor, ...]]:
    """The graph of fn that the pass sees, and what it is called with."""
    found: list[GraphModule] = []
    inputs: list[torch.Tensor] = []

    def keep(gm: GraphModule) -> None:
        found.append(copied(gm))

    def record(gm: GraphModule, given: list[Any]) -> Any:
        inputs.extend(given)
        return interpreting(keep)(gm, given)

    torch._dynamo.reset()
    with torch.no_grad(), torch._inductor.config.patch(enable_auto_functionalized_v2=False):  # as vLLM sets it
        torch.compile(fn, backend=record)(*args)
    (gm,) = found
    return gm, tuple(inputs)


def copied(gm: GraphModule) -> GraphModule:
    """A module with a graph of its own, whose nodes have the same names and values."""
    return GraphModule(gm, copy.deepcopy(gm.graph))


def listing(graph: Graph) -> list[tuple]:
    """Everything that a rewrite may change of a graph, node by node."""
    return [
        (node.op, node.name, node.target, *map_arg((node.args, node.kwargs), lambda n: n.name), node.type, node.meta)
        for node in graph.nodes
    ]


def assert_equal(given: Any, expected: Any) -> None:
    for a, b in zip(given, expected, strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a.float(), b.float())
