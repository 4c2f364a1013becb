"""Trace a function as torch.compile does, rewrite its graph, and run it eagerly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Interpreter

from normquant.compile import Site


def run(
    rewrite: Callable[[Graph], tuple[Site, ...]], fn: Callable[..., Any], *args: torch.Tensor, dynamic: bool = False
) -> tuple[Any, list[Site], list[str]]:
    """What fn returns with its graph rewritten, the sites, and the operations left. dynamic: in dimension 0."""
    sites: list[Site] = []
    left: list[str] = []

    def inner(gm: GraphModule, inputs: Any, **_: Any) -> Callable[[list[Any]], Any]:
        sites.extend(rewrite(gm.graph))
        gm.graph.lint()
        gm.recompile()
        left.extend(str(node.target) for node in gm.graph.nodes if node.op == "call_function")

        def call(inputs: list[Any]) -> Any:
            return Interpreter(gm).run(*inputs)

        call._boxed_call = True  # type: ignore[attr-defined]
        return call

    def backend(gm: GraphModule, inputs: list[Any]) -> Any:
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(gm, inputs, inner_compile=inner)

    torch._dynamo.reset()
    if dynamic:
        for arg in args:
            torch._dynamo.mark_dynamic(arg, 0)
    with torch.no_grad(), torch._inductor.config.patch(enable_auto_functionalized_v2=False):  # as vLLM sets it
        return torch.compile(fn, backend=backend)(*args), sites, left


def assert_equal(given: Any, expected: Any) -> None:
    for a, b in zip(given, expected, strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a.float(), b.float())
