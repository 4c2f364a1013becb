"""Check what the pass would do: run a model eagerly and, at each of its sites, the fused op on the same inputs.

The model is traced as `torch.compile` traces it, up to the graph that the pass sees; then the graph's operations run
one by one, eagerly, on this machine's device. Nothing is generated: what is compared is the arithmetic of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from normquant.compile.driver import run, site_name
from normquant.compile.find.axes import order
from normquant.compile.find.sites import Match, find
from normquant.compile.fusions.norm_quant import Rewriter, fused_op, op_spec
from normquant.compile.policy import Rules
from normquant.compile.report import FusionReport


@dataclass(frozen=True)
class SiteComparison:
    """One site: how many fp8 values, scales, and values of the sum and the norm were compared, and how many differ."""

    name: str
    op: str
    data: int
    data_differ: int
    scales: int
    scales_differ: int
    others: int
    others_differ: int

    @property
    def compared(self) -> int:
        return self.data + self.scales + self.others

    @property
    def differ(self) -> int:
        return self.data_differ + self.scales_differ + self.others_differ


@dataclass(frozen=True)
class Verification:
    """unfused: what the model returns. fused: what it returns with every site fused. reports: of the fused graphs."""

    sites: tuple[SiteComparison, ...]
    unfused: Any
    fused: Any
    reports: tuple[FusionReport, ...]

    @property
    def exact(self) -> bool:
        """Whether at least one site was compared and no value of any site differs."""
        return bool(self.sites) and all(site.differ == 0 for site in self.sites)


def verify(
    fn: Callable[..., Any],
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    rules: Rules | None = None,
) -> Verification:
    """Run `fn(*args, **kwargs)` unfused and fused, and compare every site on the same inputs. Compiles nothing.

    The compiler's state in this process is reset. rules: which sites are fused in `fused`; every one by default.
    """
    kwargs = kwargs or {}
    stock, fused = _Eager(None), _Eager(rules or Rules("always"))
    outputs = []
    with torch.no_grad():
        for backend in (stock, fused):
            torch._dynamo.reset()
            outputs.append(torch.compile(fn, backend=backend, dynamic=dynamic)(*args, **kwargs))
    torch._dynamo.reset()
    return Verification(tuple(stock.comparisons), outputs[0], outputs[1], tuple(fused.reports))


class _Eager:
    """A `torch.compile` backend that runs the graph of the pass eagerly: as it is and comparing sites, or fused."""

    def __init__(self, rules: Rules | None) -> None:
        self.rules = rules
        self.comparisons: list[SiteComparison] = []
        self.reports: list[FusionReport] = []

    def __call__(self, gm: GraphModule, inputs: list[Any]) -> Any:
        from torch._inductor.compile_fx import compile_fx

        inner: Any = self._inner
        return compile_fx(gm, inputs, inner_compile=inner)

    def _inner(self, gm: GraphModule, inputs: Any, **_: Any) -> Callable[[list[Any]], Any]:
        from torch._inductor.fx_passes.post_grad import view_to_reshape

        view_to_reshape(gm)
        gm.graph.eliminate_dead_code()
        matches: list[Match] = []
        if self.rules is None:
            matches = find(gm.graph).matches
        else:
            self.reports.append(run(gm.graph, self.rules, strict=True))
            gm.recompile()
        adds = {id(match): Rewriter(gm.graph).adds(match) for match in matches}

        def call(args: list[Any]) -> Any:
            recorder = _Recorder(gm, matches)
            out = recorder.run(*args)
            args.clear()
            self.comparisons += [_compare(match, adds[id(match)], recorder.values) for match in matches]
            return out

        boxed: Any = call
        boxed._boxed_call = True
        return boxed


class _Recorder(Interpreter):
    """Keeps the values that the comparison of sites needs."""

    def __init__(self, gm: GraphModule, matches: list[Match]) -> None:
        super().__init__(gm)
        self.values: dict[Node, Any] = {}
        self.wanted = {node for match in matches for node in _wanted(match)}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n in self.wanted:
            self.values[n] = result.clone() if isinstance(result, torch.Tensor) else result
        return result


def _wanted(match: Match) -> list[Node]:
    norm, addition = match.norm, match.norm.addition
    nodes = [norm.weight, norm.x, *match.norms, norm.eps if isinstance(norm.eps, Node) else None]
    nodes += [q for quant in match.quants for q in (quant.data, quant.scale)]
    if addition:
        nodes += [addition.x, addition.residual, *match.sums]
    return [node for node in nodes if node is not None]


def _compare(match: Match, add: bool, values: Mapping[Node, Any]) -> SiteComparison:
    norm = match.norm
    sources = (norm.addition.x, norm.addition.residual) if add and norm.addition else norm.sources
    rows = [values[node].reshape(-1, norm.k) for node in sources]
    op = fused_op(match, add)
    weight = values[norm.weight].reshape(norm.k)
    eps = values[norm.eps] if isinstance(norm.eps, Node) else norm.eps
    data, scale, *rest = op(*rows, weight, eps, norm.weight_offset, op_spec(match, add).encode())
    counts = {"data": [0, 0], "scales": [0, 0], "others": [0, 0]}
    for quant in match.quants:
        if quant.data is not None:
            _count(counts["data"], values[quant.data], data)
        if quant.scale is not None:
            stored = values[quant.scale]
            if quant.scale_form is not None and order(quant.scale_form) == ["g", "m"]:
                stored = stored.reshape(scale.shape[1], scale.shape[0]).t()
            _count(counts["scales"], stored, scale)
    for node in match.norms:
        _count(counts["others"], values[node], rest[-1])
    for node in match.sums if add else ():
        _count(counts["others"], values[node], rest[0])
    return SiteComparison(site_name(match), op._opname, *counts["data"], *counts["scales"], *counts["others"])


def _count(count: list[int], expected: torch.Tensor, given: torch.Tensor) -> None:
    """Add how many values there are and how many differ; NaN equals NaN, and zeros of both signs are told apart."""
    a, b = expected.reshape(given.shape), given
    wide = torch.float32 if a.dtype == torch.float8_e4m3fn else a.dtype
    a, b = a.to(wide), b.to(wide)
    same = (a == b) & (a.signbit() == b.signbit()) if a.is_floating_point() else a == b
    if a.is_floating_point():
        same |= a.isnan() & b.isnan()
    count[0] += same.numel()
    count[1] += int((~same).sum())
