"""One run of the demonstration: its parts in order, everything that they found, and the same as plain data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from normquant.audit.result import launch_us
from normquant.bench.timing import Timing
from normquant.compile import inductor_options, last_report
from normquant.compile.recording import record
from normquant.compile.verify import Check, Checks, check_sites, total
from normquant.demo.codegen import Compiled, compile_layer, is_matrix_product
from normquant.demo.deepseek_layer import (
    R1_TP8,
    SMALL,
    Dims,
    build,
    float64_twin,
    forward,
    inputs,
    relative_error,
)
from normquant.demo.gpu_timing import TOKENS as GPU_TOKENS
from normquant.demo.gpu_timing import OnGpu, measure, why_not

RULES = ("identity", "layout-copy")
TARGET = "h100"
TOKENS = 64  # a decode batch
CPU_TOKENS = 256

Progress = Callable[[str], None]


@dataclass(frozen=True)
class OnCpu:
    """The small layer, run: each site compared, and the output's relative error (Frobenius) against float64."""

    dims: Dims
    tokens: int
    checks: Checks
    unfused_error: float
    fused_error: float


@dataclass(frozen=True)
class Demonstration:
    """One run. dims, tokens, target: what was compiled; gpu: None where `no_gpu` says why."""

    dims: Dims
    tokens: int
    target: str
    before: Compiled
    after: Compiled
    cpu: OnCpu
    gpu: OnGpu | None
    no_gpu: str

    @property
    def all_fused(self) -> bool:
        """Whether there are sites, every one of them fused."""
        sites = self.after.fusion.sites
        return bool(sites) and all(site.fused for site in sites)

    @property
    def exact(self) -> bool:
        """Whether fused and replaced agree: on this CPU, and on the GPU where there is one."""
        return self.cpu.checks.holds and (self.gpu is None or self.gpu.checks.holds)

    def to_dict(self) -> dict[str, Any]:
        """The run as JSON-ready data; `kernels`, and `bytes` through DRAM, are those of all but the matrix products."""
        checks = self.cpu.checks
        found = total((*checks.random, *checks.exact))
        return {
            "layer": {"model": "DeepSeek-R1", "tokens": self.tokens, "target": self.target, **asdict(self.dims)},
            "before": _compiled(self.before),
            "after": _compiled(self.after),
            "sites": [{"name": site_name(s), "fused": s.fused, "reason": s.reason} for s in self.after.fusion.sites],
            "without_norm": [{"name": site_name(s), "reason": s.reason} for s in self.after.fusion.others],
            "exact": checks.holds,
            "compared": found.compared,
            "differ": found.differ,
            "random_inputs": _checks(checks.random),
            "exact_inputs": _checks(checks.exact),
            "error": {"unfused": self.cpu.unfused_error, "fused": self.cpu.fused_error},
            "gpu": None if self.gpu is None else _gpu(self.gpu),
            "no_gpu": self.no_gpu,
        }


def steps() -> int:
    """How many times `demonstrate` says what it does: two compiles, two runs, and those of a GPU."""
    return 4 if why_not() else 5 + len(GPU_TOKENS)


def demonstrate(progress: Progress) -> Demonstration:
    """All parts, in order."""
    progress(f"compiling the layer for an {TARGET.upper()}, stock")
    before = compile_layer(R1_TP8, TOKENS, TARGET)
    progress(f"compiling the layer for an {TARGET.upper()}, with normquant")
    after = compile_layer(R1_TP8, TOKENS, TARGET, inductor_options(), fusion=last_report)
    cpu = on_cpu(SMALL, CPU_TOKENS, progress)
    reason = why_not()
    gpu = None if reason else measure(R1_TP8, partial(inductor_options, "always"), progress)
    return Demonstration(R1_TP8, TOKENS, TARGET, before, after, cpu, gpu, reason)


def on_cpu(dims: Dims, tokens: int, progress: Progress) -> OnCpu:
    """The small layer on the CPU: fused beside unfused, and both beside float64."""
    progress("running a small layer on the CPU, fused and unfused")
    layer, tensors = build(dims, "cpu"), inputs(dims, tokens, "cpu")
    recorded = record(forward, (layer, *tensors), inductor_options("always"))  # "auto" fuses only on a GPU
    checks = check_sites(recorded.only)
    progress("running it in float64")
    with torch.no_grad():
        exact = forward(float64_twin(layer), *(t.double() for t in tensors))
    errors = [relative_error(output, exact) for output in (recorded.before, recorded.after)]
    return OnCpu(dims, tokens, checks, *errors)


def site_name(site: Any) -> str:
    """The site's module inside the layer: "input_layernorm"."""
    return site.name.removeprefix("layer.")


def estimate_us(compiled: Compiled) -> float:
    """Estimated time of the kernels: a launch each, and their bytes at copy speed."""
    return sum(launch_us(kernel, compiled.report.target) for kernel in compiled.kernels)


def _compiled(compiled: Compiled) -> dict[str, Any]:
    return {
        "kernels": len(compiled.kernels),
        "bytes": compiled.bytes,
        "findings": {rule: compiled.report.count(rule) for rule in RULES},
        "matrix_products": sum(map(is_matrix_product, compiled.report.launches)),
        "est_us": round(estimate_us(compiled), 2),
        "norms": [
            {"name": norm.name, "k": norm.k, "kernels": len(norm.launches), "bytes": norm.bytes}
            for norm in compiled.norms
        ],
    }


def _checks(checks: Sequence[Check]) -> dict[str, Any]:
    found = total(checks)
    sites = [
        {
            "name": site_name(c),
            "op": c.op,
            "fp8": asdict(c.values),
            "scales": asdict(c.scales),
            "other": asdict(c.others),
        }
        for c in checks
    ]
    return {"compared": found.compared, "differ": found.differ, "sites": sites}


def _gpu(gpu: OnGpu) -> dict[str, Any]:
    return {
        "name": gpu.name,
        "fp8_gemm": gpu.fp8_gemm,
        "times": [
            {
                "tokens": times.tokens,
                "stock": _timing(times.stock),
                "normquant": _timing(times.fused),
                "speedup": round(times.speedup, 3),
            }
            for times in gpu.times
        ],
        "empty_us": round(gpu.empty_us, 3),
        "copy_gbps": round(gpu.copy_gbps, 1),
        "exact": gpu.checks.holds,
        "random_inputs": _checks(gpu.checks.random),
        "exact_inputs": _checks(gpu.checks.exact),
    }


def _timing(timing: Timing) -> dict[str, float | int]:
    return {name: round(value, 3) for name, value in asdict(timing).items()}
