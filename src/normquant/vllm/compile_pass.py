"""The compile pass as vLLM's pass manager runs it, and where in the manager's list it goes."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from torch._inductor.custom_graph_pass import get_hash_for_files
from torch.fx import Graph
from vllm import __version__ as vllm_version
from vllm.compilation.passes.inductor_pass import InductorPass, get_pass_context

from normquant.compile import Site, reports
from normquant.compile.driver import NormQuantPass
from normquant.compile.find import columns, rotary
from normquant.compile.find.linear_ops import linear_kernels, remark
from normquant.compile.fusions import group_quant, latent_norm_quant, rope_last, silu_mul_quant, vllm_fused_ops
from normquant.compile.graph_warmup import warm_graph
from normquant.compile.policy import Rules
from normquant.version import VERSION
from normquant.vllm.graph_records import GraphRecord, append
from normquant.vllm.switches import Switches

T = TypeVar("T")

log = logging.getLogger("vllm.normquant")  # below "vllm", so that vLLM's own handlers show it

NORM_QUANT = ("RMSNormQuantFusionPass", "RocmAiterRMSNormQuantFusionPass")
# What vLLM runs ahead of its own norm-quant fusion: clean-up, and collectives that take a norm with them.
EARLIER = (
    "NoOpEliminationPass",
    "SequenceParallelismPass",
    "AsyncTPPass",
    "AddRMSNormFusionPass",
    "RMSNormReshapeFusionPass",
    "RocmAiterTritonAddRMSNormPadFusionPass",
    "AllReduceFusionPass",
    "RocmAiterAllReduceFusionPass",
)
REWRITES = (
    columns,
    group_quant,
    latent_norm_quant,
    rope_last,
    rotary,
    silu_mul_quant,
    vllm_fused_ops,
)
SOURCES = (__file__, *(str(module.__file__) for module in REWRITES))


class VllmNormQuantPass(InductorPass):
    """`NormQuantPass` for vLLM: its uuid is text, and its reports are also written beside vLLM's compile cache.

    directory: where the reports go; None: nowhere but `normquant.explain()`.
    """

    def __init__(self, switches: Switches, directory: Path | None) -> None:
        self.fusion = NormQuantPass(switches.rules, switches.strict)
        self.directory = directory

    def uuid(self) -> str:
        return pass_key(self.fusion)

    def __call__(self, graph: Graph) -> None:
        linear = linear_kernels(graph)
        taken = self._guarded(vllm_fused_ops.replace_fused_ops, graph)
        gated = self._guarded(silu_mul_quant.fuse_silu_quant, graph)  # first: what it fuses is not left over later
        latents = self._guarded(latent_norm_quant.fuse_latents, graph)
        turned = self._guarded(rope_last.fuse_q_rope, graph)
        self.fusion(graph)
        report = reports()[-1]
        lone = self._guarded(group_quant.replace_lone_quants, graph)
        gone = {site.name for site in lone}
        others = tuple(site for site in report.others if site.name not in gone)
        report = replace(report, sites=(*latents, *turned, *report.sites, *taken, *gated, *lone), others=others)
        if report.error:
            log.warning("normquant left a graph as it was: %s", report.error)
        log.debug("%s", report)
        self._warm_up(graph)
        for kernel in filter(remark, linear):
            log.info("normquant: linear kernel %s %s", kernel, remark(kernel))
        if self.directory is None or not (report.sites or report.others or report.error or linear):
            return
        rows = str(get_pass_context().compile_range)
        try:
            append(self.directory, GraphRecord(VERSION, vllm_version, rows, report.to_dict(), linear))
        except OSError as error:
            log.warning("normquant's report was not written: %s", error)

    def _warm_up(self, graph: Graph) -> None:
        """Have every size of batch compiled now, not by the first request that has it."""
        start = time.monotonic()
        if count := self._attempt("warming up", lambda: warm_graph(graph)):
            log.info("normquant: %d kernels warmed up in %.1f s", count, time.monotonic() - start)

    def _guarded(self, rewrite: Callable[[Graph, Rules], tuple[Site, ...]], graph: Graph) -> tuple[Site, ...]:
        """What a rewrite did; nothing where it failed."""
        return self._attempt(rewrite.__name__, lambda: rewrite(graph, self.fusion.rules)) or ()

    def _attempt(self, name: str, step: Callable[[], T]) -> T | None:
        """What a step returns; None, after a warning, where it failed, unless strict."""
        try:
            return step()
        except Exception as error:
            if self.fusion.strict:
                raise
            log.warning("normquant: %s failed: %s: %s", name, type(error).__name__, error)
            return None


def pass_key(fusion: NormQuantPass) -> str:
    """Changes with normquant's version, with the sources of its pass, and with every switch."""
    return hashlib.sha256(f"normquant {VERSION} ".encode() + fusion.uuid() + get_hash_for_files(SOURCES)).hexdigest()


def position(passes: Sequence[Any]) -> int:
    """Where in vLLM's list the pass goes: ahead of vLLM's norm-quant fusion, or where that would stand."""
    names = [type(entry).__name__ for entry in passes]
    found = [names.index(name) for name in NORM_QUANT if name in names]
    if found:
        return min(found)
    return max((i + 1 for i, name in enumerate(names) if name in EARLIER), default=0)


def insert(manager: Any, switches: Switches, config: Any) -> VllmNormQuantPass:
    """Put the pass into a configured PostGradPassManager."""
    directory = getattr(config.compilation_config, "local_cache_dir", None)
    entry = VllmNormQuantPass(switches, Path(directory) if directory else None)
    manager.passes.insert(position(manager.passes), entry)
    return entry
