"""The compile pass as vLLM's pass manager runs it, and where in the manager's list it goes."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch.fx import Graph
from vllm import __version__ as vllm_version
from vllm.compilation.passes.inductor_pass import InductorPass, get_pass_context

from normquant.compile import FusionReport, driver
from normquant.compile.driver import NormQuantPass
from normquant.compile.fusions import norm_quant
from normquant.compile.fusions.candidate import Fusion
from normquant.compile.fusions.vllm_experts import ExpertInputs
from normquant.compile.fusions.vllm_linear import QuantizedInputs
from normquant.compile.graph_warmup import warm_graph
from normquant.version import VERSION
from normquant.vllm import compiled_experts, fp8_linear
from normquant.vllm.graph_records import GraphRecord, append, linear_kernels, remark
from normquant.vllm.switches import Switches
from normquant.vllm.tensor_parallel import (
    ALL_REDUCE_FUSIONS,
    NormQuantBesideVllm,
    all_reduce_fusion,
    fuses_all_reduces,
)

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
    *ALL_REDUCE_FUSIONS,
)


class VllmNormQuantPass(InductorPass):
    """`NormQuantPass` for vLLM: its uuid is text, and its reports are also written beside vLLM's compile cache.

    directory: where the reports go; None: nowhere but `normquant.explain()`. passes: vLLM's list, in which it stands.
    """

    def __init__(self, switches: Switches, directory: Path | None, passes: Sequence[Any] = ()) -> None:
        self.switches = switches
        self.passes = passes
        self.fusion = _fusion(switches, self._vllm_fuses_all_reduces)
        self.directory = directory

    def uuid(self) -> str:
        return pass_key(self.switches)

    def __call__(self, graph: Graph) -> None:
        report = self.fusion.rewrite(graph)
        linear = linear_kernels(graph)
        if report.error:
            what = "failed in a part of a graph" if report.sites else "left a graph as it was"
            log.warning("normquant %s: %s", what, report.error)
        log.debug("%s", report)
        self._warm_up(graph)
        for kernel in filter(remark, linear):
            log.info("normquant: linear kernel %s %s", kernel, remark(kernel))
        if self.directory is not None and (report.sites or report.others or report.error or linear):
            self._keep(report, linear, self.directory)

    def _vllm_fuses_all_reduces(self) -> bool:
        return self.switches.all_reduce and fuses_all_reduces(self.passes, get_pass_context().compile_range)

    def _keep(self, report: FusionReport, linear: dict[str, int], directory: Path) -> None:
        """Write the report beside vLLM's compile cache."""
        rows = str(get_pass_context().compile_range)
        try:
            append(directory, GraphRecord(VERSION, vllm_version, rows, report.to_dict(), linear))
        except OSError as error:
            log.warning("normquant's report was not written: %s", error)

    def _warm_up(self, graph: Graph) -> None:
        """Have every size of batch compiled now, not by the first request that has it."""
        start = time.monotonic()
        try:
            count = warm_graph(graph)
        except Exception as error:
            if self.switches.strict:
                raise
            log.warning("normquant: warming up failed: %s: %s", type(error).__name__, error)
            return
        if count:
            log.info("normquant: %d kernels warmed up in %.1f s", count, time.monotonic() - start)


def _fusion(switches: Switches, fuses_later: Callable[[], bool] = bool) -> NormQuantPass:
    deepgemm_alone = os.environ.get("VLLM_BATCH_INVARIANT", "0") != "0"
    quantized_inputs = QuantizedInputs(fp8_linear.lacks, fp8_linear.flashinfer_version(), deepgemm_alone)
    experts = ExpertInputs(compiled_experts.experts_spec)
    norms = NormQuantBesideVllm(fuses_later)
    others = [norms if fusion is norm_quant.find else fusion for fusion in driver.VLLM_FUSIONS]
    fusions: tuple[Fusion, ...] = (quantized_inputs, experts, all_reduce_fusion(switches.all_reduce), *others)
    return NormQuantPass(switches.rules, switches.strict, fusions)


def pass_key(switches: Switches) -> str:
    """Changes with normquant's version, with the sources of its pass, and with every switch."""
    return hashlib.sha256(f"normquant {VERSION} ".encode() + _fusion(switches).uuid()).hexdigest()


def position(passes: Sequence[Any], all_reduce: bool = False) -> int:
    """Where in vLLM's list the pass goes: ahead of vLLM's norm-quant fusion, or where that would stand; with
    `all_reduce` ahead of vLLM's fusion of all-reduces, too, if there is one."""
    names = [type(entry).__name__ for entry in passes]
    ahead_of = (*NORM_QUANT, *ALL_REDUCE_FUSIONS * all_reduce)
    found = [names.index(name) for name in ahead_of if name in names]
    if found:
        return min(found)
    return max((i + 1 for i, name in enumerate(names) if name in EARLIER), default=0)


def insert(manager: Any, switches: Switches, config: Any) -> VllmNormQuantPass:
    """Put the pass into a configured PostGradPassManager."""
    directory = getattr(config.compilation_config, "local_cache_dir", None)
    entry = VllmNormQuantPass(switches, Path(directory) if directory else None, manager.passes)
    manager.passes.insert(position(manager.passes, switches.all_reduce), entry)
    return entry
