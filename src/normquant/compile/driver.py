"""The pass as Inductor runs it: find the sites of a graph, decide, rewrite, report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

from normquant import distributed, linear, ops, reference, spec, specs
from normquant.compile import direct_calls, fusion_report
from normquant.compile.edit.build import Builder
from normquant.compile.edit.cleanup import clean, keep_outputs_apart, output_owners
from normquant.compile.edit.snapshot import restore, states
from normquant.compile.find.graph import Unsupported
from normquant.compile.fusion_report import FusionReport, Site
from normquant.compile.fusions import (
    gated_norm_quant,
    group_quant,
    latent_norm_quant,
    norm_quant,
    product_pair,
    rope_last,
    silu_mul_quant,
    vllm_fused_ops,
)
from normquant.compile.fusions.all_reduce_norm_quant import AllReduceNormQuant
from normquant.compile.fusions.candidate import Candidate, Fusion, Rejection
from normquant.compile.policy import Rules

FUSIONS: tuple[Fusion, ...] = (gated_norm_quant.find, norm_quant.find, product_pair.find)
ALL_REDUCE_FUSIONS: tuple[Fusion, ...] = (AllReduceNormQuant(), *FUSIONS)
# Gated products and latents first: what they take is not left over for a norm or a quantization alone.
VLLM_FUSIONS: tuple[Fusion, ...] = (
    vllm_fused_ops.find,
    silu_mul_quant.find,
    gated_norm_quant.find,
    latent_norm_quant.find,
    rope_last.find,
    norm_quant.find,
    group_quant.find,
    product_pair.find,  # of what the others have made
)
SOURCES = (  # whatever decides what the pass makes of a graph
    *sorted(map(str, Path(__file__).parent.rglob("*.py"))),
    *sorted(map(str, Path(__file__).parent.rglob("*.json"))),
    *sorted(map(str, Path(ops.__file__).parent.rglob("*.py"))),
    *sorted(map(str, Path(distributed.__file__).parent.glob("*.py"))),
    *sorted(map(str, Path(distributed.__file__).parent.glob("*.json"))),
    *sorted(map(str, Path(linear.__file__).parent.rglob("*.py"))),
    *sorted(map(str, Path(linear.__file__).parent.rglob("*.json"))),
    *(module.__file__ for module in (reference, spec, specs)),
)


class NormQuantPass(CustomGraphPass):
    """Fuses the norm -> quant sites of the graphs that Inductor compiles; for `post_grad_custom_pre_pass`.

    strict: let an exception of the pass end the compile; else the graph is compiled as it was and the report says why.
    Passes with the same options are equal: functions that are compiled with equal options share their compiled code.
    """

    def __init__(self, rules: Rules | None = None, strict: bool = False, fusions: tuple[Fusion, ...] = FUSIONS) -> None:
        self.rules = rules or Rules()
        self.strict = strict
        self.fusions = fusions

    def uuid(self) -> Any:
        """Changes with the sources of the pass and with every option, so that compile caches miss when they should."""
        names = [_identity(fusion) for fusion in self.fusions]
        return get_hash_for_files(SOURCES, extra=repr((self.rules.identity, self.strict, names)))

    def _options(self) -> tuple[Rules, bool, tuple[Fusion, ...]]:
        return self.rules, self.strict, self.fusions

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NormQuantPass) and self._options() == other._options()

    def __hash__(self) -> int:
        return hash(self._options())

    def __call__(self, graph: Graph) -> None:
        self.rewrite(graph)

    def rewrite(self, graph: Graph) -> FusionReport:
        """Rewrite the graph and say what was done; `normquant.explain()` has the report as well."""
        direct_calls.register()
        return fusion_report.add(run(graph, self.rules, self.strict, self.fusions))


def _identity(fusion: Fusion) -> Any:
    """What a fusion does is decided by: its settings, and for one that asks what else, that."""
    if (asked := getattr(fusion, "identity", None)) is not None:
        return repr(fusion), asked()
    return repr(fusion) if is_dataclass(fusion) else fusion.__module__


def run(graph: Graph, rules: Rules, strict: bool = False, fusions: Sequence[Fusion] = FUSIONS) -> FusionReport:
    """Rewrite the graph and say what was done. A site whose rewrite fails stays as it was, and where the clean-up after
    the rewrites fails the whole graph does; with strict the exception follows."""
    done, before = _Record(strict), states(graph.nodes)
    try:
        cleaned = _rewrite(graph, rules, fusions, done)
    except Exception as error:
        restore(graph, before)
        if strict:
            raise
        cleaned = done.give_up(error)
    return done.report(graph, rules.policy, cleaned)


def _rewrite(graph: Graph, rules: Rules, fusions: Sequence[Fusion], done: _Record) -> int:
    """Rewrite every site, and clean up; returns how many identities and copies that removed."""
    owners = output_owners(graph)
    for find in fusions:
        before = done.rewritten
        done.guard(partial(_rewrite_all, graph, find, rules, done))
        if done.rewritten > before:
            graph.eliminate_dead_code()
    if not done.rewritten:
        return 0
    cleaned = clean(graph)
    keep_outputs_apart(graph, owners)
    return cleaned


@dataclass
class _Record:
    """What was done so far. sites: each with the node that has to be left in the graph for it to count, or None.
    lone: of each quantization without a norm. told: quantizations of sites. rewritten: how many sites."""

    strict: bool
    sites: list[tuple[Site, Node | None]] = field(default_factory=list)
    lone: dict[Node, Site] = field(default_factory=dict)
    told: set[Node] = field(default_factory=set)
    rewritten: int = 0
    errors: list[str] = field(default_factory=list)

    def guard(self, step: Callable[[], None]) -> None:
        """Do a step that changes nothing when it fails; a failure is an error in the report, unless strict."""
        try:
            step()
        except Exception as error:
            if self.strict:
                raise
            self.errors.append(f"{type(error).__name__}: {error}")

    def give_up(self, error: Exception) -> int:
        """Every site stays after all, since the graph is the graph before; no copy was removed."""
        text = f"{type(error).__name__}: {error}"
        self.errors.append(text)
        self.sites = [(_stays(site, text), None) for site, _ in self.sites]
        self.lone = {node: _stays(site, text) for node, site in self.lone.items()}
        return 0

    def add(self, found: Candidate | Rejection, site: Site, stands_for: Node | None = None) -> None:
        self.rewritten += site.strategy != "stock"
        if found.told is not None:
            self.told.add(found.told)
        if found.lone is not None and not site.fused:
            self.lone[found.lone] = site
            return
        if found.lone is not None:
            self.lone.pop(found.lone, None)
        self.sites.append((site, stands_for))

    def report(self, graph: Graph, policy: str, cleaned: int) -> FusionReport:
        """Everything that holds for the graph as it is now: a node that another fusion has taken in counts there."""
        nodes = set(graph.nodes)
        sites = tuple(site for site, node in self.sites if node is None or node in nodes)
        told = self.told.union(node for _, node in self.sites if node is not None)
        others = tuple(site for node, site in self.lone.items() if node not in told)
        return FusionReport(0, policy, sites, others, cleaned, "; ".join(dict.fromkeys(self.errors)))


def _rewrite_all(graph: Graph, find: Fusion, rules: Rules, done: _Record) -> None:
    for found in find(graph):
        if isinstance(found, Rejection):
            done.add(found, found.site)
        else:
            _decide(graph, found, rules, done)


def _decide(graph: Graph, candidate: Candidate, rules: Rules, done: _Record) -> None:
    """Rewrite a site as the policy wants it, and record it, if that is due. After a failure the graph is the graph
    before."""
    decision = rules.decide(candidate.name, candidate.facts)
    edit = candidate.rewrite(decision.strategy)
    if edit is None:
        if not candidate.listed:
            done.add(candidate, candidate.record("stock", "" if candidate.remark else decision.reason))
        return
    new = Builder(graph)
    try:
        rewrite = edit(new)
        site = candidate.record(decision.strategy, decision.reason, rewrite.note)
        rewrite.commit(new.made)
    except Exception as error:
        new.erase()
        unsupported = isinstance(error, Unsupported)
        if done.strict and not unsupported:
            raise
        reason = str(error) if unsupported else f"the rewrite failed: {type(error).__name__}: {error}"
        done.add(candidate, candidate.record("stock", reason))
        return
    done.add(candidate, site, rewrite.stands_for)


def _stays(site: Site, error: str) -> Site:
    """The record of a site whose rewrite was taken back."""
    if site.strategy == "stock":
        return site
    saved: dict[str, Any] = {"op": "", "bytes_moved": 0, "bytes_saved": 0, "kernels_saved": 0}
    return replace(site, strategy="stock", reason=f"the pass was given up: {error}", **saved)
