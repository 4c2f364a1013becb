"""Run the compile pass without a code generator: the graph that Inductor would lower is executed eagerly, as it is or
rewritten, so that what differs is the arithmetic of the rewrite and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
from torch.fx import Graph, GraphModule, Interpreter

from normquant.compile import FusionReport, Site, driver
from normquant.compile.driver import run
from normquant.compile.policy import Rules

keeps_roundings = pytest.mark.skipif(
    torch.__version__ < (2, 13),
    reason="before 2.13 Inductor removes a cast to bf16 that is widened again, before the pass sees the graph",
)


@dataclass
class Outcome:
    """What a function returned with the pass on, the reports of its graphs, and the graphs after the pass."""

    result: Any = None
    reports: list[FusionReport] = field(default_factory=list)
    graphs: list[GraphModule] = field(default_factory=list)

    @property
    def sites(self) -> list[Site]:
        return [site for report in self.reports for site in report.sites]

    @property
    def site(self) -> Site:
        (site,) = self.sites
        return site

    @property
    def fused(self) -> list[Site]:
        return [site for site in self.sites if site.fused]

    def ops(self, *names: str) -> list[str]:
        """Names of the operations that are left and start with one of `names`; ours by default."""
        found = [str(n.target) for g in self.graphs for n in g.graph.nodes if n.op == "call_function"]
        return [name for name in found if name.startswith(names or ("normquant.",))]


def run_with_pass(
    fn: Callable[..., Any],
    *args: Any,
    rules: Rules | None = None,
    dynamic: bool | None = None,
    fullgraph: bool = True,
    strict: bool = True,
    **kwargs: Any,
) -> Outcome:
    """Trace `fn` as torch.compile does, rewrite its graphs, execute them eagerly."""
    outcome = Outcome()

    def change(gm: GraphModule) -> None:
        from torch._inductor.fx_passes.post_grad import view_to_reshape

        view_to_reshape(gm)
        gm.graph.eliminate_dead_code()
        outcome.reports.append(run(gm.graph, rules or Rules("always"), strict))
        outcome.graphs.append(gm)

    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(fn, backend=interpreting(change), dynamic=dynamic, fullgraph=fullgraph)
        outcome.result = compiled(*args, **kwargs)
    return outcome


def interpreting(change: Callable[[GraphModule], None]) -> Callable[[GraphModule, list[Any]], Any]:
    """A backend of torch.compile that runs the graphs that Inductor would lower eagerly, each after `change`."""

    def inner(gm: GraphModule, inputs: Any, **_: Any) -> Callable[[list[Any]], Any]:
        change(gm)
        gm.graph.lint()
        gm.recompile()

        def call(inputs: list[Any]) -> Any:
            return Interpreter(gm).run(*inputs)

        call._boxed_call = True  # type: ignore[attr-defined]
        return call

    def backend(gm: GraphModule, inputs: list[Any]) -> Any:
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(gm, inputs, inner_compile=inner)

    return backend


def site_of_graph(gm: GraphModule) -> Site:
    """The only site of a graph that was made by hand, after the rewrite."""
    (site,) = run(gm.graph, Rules("always"), strict=True).sites
    gm.graph.lint()
    gm.recompile()
    return site


def share_of_the_pass(compile_once: Callable[[], None]) -> float:
    """The part of a compile's CPU time that the pass takes."""
    spent: list[float] = []
    call = driver.NormQuantPass.__call__

    def timed(self: driver.NormQuantPass, graph: Graph) -> None:
        start = time.process_time()
        call(self, graph)
        spent.append(time.process_time() - start)

    with mock.patch.object(driver.NormQuantPass, "__call__", timed):
        start = time.process_time()
        compile_once()
        whole = time.process_time() - start
    assert spent, "the pass did not run"
    return sum(spent) / whole


def exact(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    """Multiples of 1/4 up to 2: sums of their squares, and of the squares of sums of two of them, are exact in fp32."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-8, 9, shape, generator=generator) / 4).to(dtype)


def assert_same(given: Any, expected: Any, note: str = "") -> None:
    """Equal to the bit, NaN where NaN, in dtype and shape as well."""
    if isinstance(expected, torch.Tensor):
        assert given.dtype == expected.dtype and given.shape == expected.shape, f"{note}: {given.dtype} {given.shape}"
        a, b = (t.float() if t.dtype == torch.float8_e4m3fn else t for t in (given, expected))
        different = (a != b) & ~((a != a) & (b != b))
        assert not different.any(), f"{note}: {int(different.sum())} of {different.numel()} values differ"
    elif isinstance(expected, (tuple, list)):
        assert len(given) == len(expected), note
        for i, (a, b) in enumerate(zip(given, expected, strict=True)):
            assert_same(a, b, f"{note}[{i}]")
    else:
        assert given == expected, note
