"""The pass as Inductor runs it: find the sites of a graph, decide, rewrite, report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

from normquant import ops, reference, spec, specs
from normquant.compile import fusion_report
from normquant.compile.edit.build import Builder
from normquant.compile.edit.cleanup import clean, keep_outputs_apart, output_owners
from normquant.compile.find.graph import Unsupported
from normquant.compile.fusion_report import FusionReport, Site
from normquant.compile.fusions import (
    group_quant,
    latent_norm_quant,
    norm_quant,
    rope_last,
    silu_mul_quant,
    vllm_fused_ops,
)
from normquant.compile.fusions.candidate import Candidate, Fusion, Rejection
from normquant.compile.policy import Rules

FUSIONS: tuple[Fusion, ...] = (norm_quant.find,)
# Gated products and latents first: what they take is not left over for a norm or a quantization alone.
VLLM_FUSIONS: tuple[Fusion, ...] = (
    vllm_fused_ops.find,
    silu_mul_quant.find,
    latent_norm_quant.find,
    rope_last.find,
    norm_quant.find,
    group_quant.find,
)
SOURCES = (  # whatever decides what the pass makes of a graph
    *sorted(map(str, Path(__file__).parent.rglob("*.py"))),
    *sorted(map(str, Path(__file__).parent.rglob("*.json"))),
    *sorted(map(str, Path(ops.__file__).parent.rglob("*.py"))),
    *(module.__file__ for module in (reference, spec, specs)),
)


class NormQuantPass(CustomGraphPass):
    """Fuses the norm -> quant sites of the graphs that Inductor compiles; for `post_grad_custom_pre_pass`.

    strict: let an exception of the pass end the compile; else the graph is compiled as it was and the report says why.
    """

    def __init__(self, rules: Rules | None = None, strict: bool = False, fusions: tuple[Fusion, ...] = FUSIONS) -> None:
        self.rules = rules or Rules()
        self.strict = strict
        self.fusions = fusions

    def uuid(self) -> Any:
        """Changes with the sources of the pass and with every option, so that compile caches miss when they should."""
        names = [fusion.__module__ for fusion in self.fusions]
        return get_hash_for_files(SOURCES, extra=repr((self.rules.key(), self.strict, names)))

    def __call__(self, graph: Graph) -> None:
        self.rewrite(graph)

    def rewrite(self, graph: Graph) -> FusionReport:
        """Rewrite the graph and say what was done; `normquant.explain()` has the report as well."""
        return fusion_report.add(run(graph, self.rules, self.strict, self.fusions))


def run(graph: Graph, rules: Rules, strict: bool = False, fusions: Sequence[Fusion] = FUSIONS) -> FusionReport:
    """Rewrite the graph and say what was done. A site whose rewrite fails stays as it was, unless strict."""
    done, owners = _Record(strict), output_owners(graph)
    for find in fusions:
        before = done.rewritten
        done.guard(partial(_rewrite_all, graph, find, rules, done))
        if done.rewritten > before:
            graph.eliminate_dead_code()
    cleaned = done.guard(partial(_clean_up, graph, owners)) if done.rewritten else 0
    error = "; ".join(dict.fromkeys(done.errors))
    return FusionReport(0, rules.policy, tuple(done.sites), tuple(done.lone.values()), cleaned or 0, error)


@dataclass
class _Record:
    """What was done so far. lone: of each quantization without a norm. rewritten: how many sites."""

    strict: bool
    sites: list[Site] = field(default_factory=list)
    lone: dict[Node, Site] = field(default_factory=dict)
    rewritten: int = 0
    errors: list[str] = field(default_factory=list)

    def guard(self, step: Callable[[], Any]) -> Any:
        """What a step returns; None, and an error in the report, where it fails, unless strict."""
        try:
            return step()
        except Exception as error:
            if self.strict:
                raise
            self.errors.append(f"{type(error).__name__}: {error}")
            return None

    def add(self, found: Candidate | Rejection, site: Site) -> None:
        self.rewritten += site.strategy != "stock"
        if found.lone is None:
            self.sites.append(site)
        elif site.fused:
            self.lone.pop(found.lone, None)
            self.sites.append(site)
        else:
            self.lone[found.lone] = site


def _rewrite_all(graph: Graph, find: Fusion, rules: Rules, done: _Record) -> None:
    for found in find(graph):
        site = found.site if isinstance(found, Rejection) else _decide(graph, found, rules, done.strict)
        if site is not None:
            done.add(found, site)


def _decide(graph: Graph, candidate: Candidate, rules: Rules, strict: bool) -> Site | None:
    """Rewrite a site as the policy wants it; returns its record, if one is due. After a failure the graph is the graph
    before."""
    decision = rules.decide(candidate.name, candidate.facts)
    rewrite = candidate.rewrite(decision.strategy)
    if rewrite is None:
        return None if candidate.listed else candidate.record("stock", "" if candidate.remark else decision.reason)
    new = Builder(graph)
    try:
        made = rewrite(new)
    except Exception as error:
        new.erase()
        if isinstance(error, Unsupported):
            return candidate.record("stock", str(error))
        if strict:
            raise
        return candidate.record("stock", f"the rewrite failed: {type(error).__name__}: {error}")
    made.commit(new.made)
    return candidate.record(decision.strategy, decision.reason, made.note)


def _clean_up(graph: Graph, owners: list[Node | None]) -> int:
    cleaned = clean(graph)
    keep_outputs_apart(graph, owners)
    return cleaned
