"""What a measurement is: the records of each suite, and where they were measured; `record_files` has them as JSON."""

from __future__ import annotations

import datetime
import shlex
import sys
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # reading records takes no torch
    from normquant.bench.timing import Timing


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a record was measured: GPU, versions and the command that did it. date: the day, "" in older records."""

    gpu: str
    torch: str
    triton: str
    version: str
    command: str
    date: str = ""


@dataclass(frozen=True)
class KernelRecord(Provenance):
    """One provider on one case of `normquant bench kernels`.

    inputs: "dram", in enough sets to fill the L2 five times, at most 64; "l2", in as many as stay in it.
    us, us_p10, us_p90: microseconds a call, over n samples. bytes: what the op has to move. gbps: bytes / us.
    pct_of_copy: gbps as a percentage of the better copy's of as many bytes in the same run; None for an empty kernel.
    match: how the data compares with the reference of the provider's own rule: "bitwise", "N of TOTAL values differ",
        or why it was not compared.
    """

    suite: str
    op: str
    m: int
    k: int
    group: int
    layout: str
    scale: str
    residual: bool
    normed: bool
    provider: str
    inputs: str
    us: float
    us_p10: float
    us_p90: float
    n: int
    bytes: int
    gbps: float
    pct_of_copy: float | None
    match: str


@dataclass(frozen=True)
class RanksRecord(KernelRecord):
    """The same on `ranks` GPUs of one host: times of the slowest rank, graphs replayed back to back on all of them.

    bytes: what one rank must read and write for itself, whatever is sent.
    """

    ranks: int


@dataclass(frozen=True)
class LinearRecord(Provenance):
    """One provider's product of [m, k] by [n, k], or a part of what goes with it, as `bench.products` names them.

    reader: the op that reads the product, "" for none. us, us_p10, us_p90: microseconds a call, over `samples` samples.
    error: norm of the difference from float64 over its norm; None where nothing was multiplied to the end.
    """

    suite: str
    k: int
    n: int
    m: int
    reader: str
    provider: str
    part: str
    us: float
    us_p10: float
    us_p90: float
    samples: int
    error: float | None


@dataclass(frozen=True)
class DecodeRecord(Provenance):
    """A decode step of m tokens through `layers` layers of one GPU's share of a model, by who multiplies in it.

    provider: as `bench.decode` names them. us, us_p10, us_p90: microseconds a layer, over `samples` samples.
    error: norm of the difference from the same layers with products in float32, over that norm, after the first ones.
    """

    suite: str
    model: str
    layers: int
    m: int
    provider: str
    us: float
    us_p10: float
    us_p90: float
    samples: int
    error: float


@dataclass(frozen=True)
class LayerRecord(Provenance):
    """One setting of one model's decoder layer: microseconds a call over n samples, and its GPU kernels."""

    suite: str
    model: str
    setting: str
    m: int
    us: float
    us_p10: float
    us_p90: float
    n: int
    kernels: int


@dataclass(frozen=True)
class VllmRecord(Provenance):
    """One setting of vLLM at one batch size: a step that decodes `batch` requests, over n windows of steps.

    setting: "installed", vLLM as pip installs it, or "installed-normquant". In a laboratory, with the linear kernel
        chosen for vLLM: "default", "off" (without its norm-quant fusion), "unfused" (without that of silu either) or
        "normquant". policy: normquant's, else "".
    linear: the block-FP8 kernel that vLLM used. layers: all of them; moe: whether some have experts.
    gpu_us_per_step: microseconds in which any kernel ran; classes: the same by class; sum_us_per_step: the sum of all
        kernels' lengths, more where kernels overlap. kernels: in a step. tpot_ms: wall time of a step.
    replay_us: the captured step, replayed back to back with no host in between. launch_us: the CPU's time to launch it
        on an idle GPU. None where vLLM captured none; launch_us also in records from before it was measured.
    prefill_ms, prefill_gpu_us: one prompt, by its tokens.
    logit_error: norm of the difference from a float32 run over that run's norm; p10, p90: over positions.
    scales, scales_not_power_of_two: activation scales that reached DeepGEMM in a separate run.
    findings: of `normquant audit` in the code that vLLM generated, by rule. flashinfer: its version, "" where it is not
        installed. switches: environment variables that chose a kernel.
    tensor_parallel: GPUs that computed the model together; the figures are the first one's, replay_us the slowest's.
    products: normquant's rule for products of few rows, "" in records from before it was measured, and without it.
    compiled: whether vLLM compiled the model; else it captured its decode steps as they are.
    """

    suite: str
    setting: str
    linear: str
    layers: int
    moe: bool
    batch: int
    gpu_us_per_step: float
    us_p10: float
    us_p90: float
    n: int
    sum_us_per_step: float
    classes: dict[str, float]
    kernels: int
    tpot_ms: float
    prefill_ms: dict[str, float]
    prefill_gpu_us: dict[str, float]
    logit_error: float
    logit_error_p10: float
    logit_error_p90: float
    scales: int
    scales_not_power_of_two: int
    findings: dict[str, int]
    policy: str
    vllm: str
    flashinfer: str = ""
    replay_us: float | None = None
    switches: dict[str, str] = field(default_factory=dict)
    tensor_parallel: int = 1
    products: str = ""
    compiled: bool = True
    launch_us: float | None = None


Record = KernelRecord | LinearRecord | DecodeRecord | LayerRecord | VllmRecord
TIMES = ("us", "gpu_us_per_step")  # what a record measured, whichever of them it has
SUITES: dict[str, type[Record]] = {
    "kernels": KernelRecord,
    "linear": LinearRecord,
    "decode": DecodeRecord,
    "layer": LayerRecord,
    "vllm": VllmRecord,
}


def current_run(version: str) -> Provenance:
    """Where this process measures."""
    import torch
    import triton

    return Provenance(
        gpu=torch.cuda.get_device_name(),
        torch=torch.__version__,
        triton=triton.__version__,
        version=version,
        command=current_command(),
        date=today(),
    )


def today() -> str:
    """The day, as records have it."""
    return datetime.date.today().isoformat()


def current_command() -> str:
    """The command line of this process as a shell takes it, without where its results go."""
    words = iter(sys.argv[1:])
    kept = (w for w in words if not (w in ("--output", "--keep") and next(words, "")))
    return shlex.join(["normquant", *kept])


def time_fields(timing: Timing, digits: int) -> dict[str, Any]:
    """The fields of a record that are a timing, microseconds rounded to `digits`."""
    return {name: round(value, digits) for name, value in asdict(timing).items()}


def timing_fields(timing: Timing, moved: int) -> dict[str, Any]:
    """The fields of a kernel's record that come from a timing; `moved` is in bytes."""
    return time_fields(timing, 3) | {"bytes": moved, "gbps": round(moved / timing.us / 1e3, 1)}
