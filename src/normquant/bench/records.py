"""Measurements as JSON lines, one record a line, and their schema."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from normquant.bench.timing import Timing


@dataclass(frozen=True)
class Run:
    """Where a record was measured: GPU, versions and the command that did it."""

    gpu: str
    torch: str
    triton: str
    version: str
    command: str


@dataclass(frozen=True)
class KernelRecord:
    """One provider on one case of `normquant bench kernels`.

    inputs: "dram", 64 sets of them or as many as make five times the L2; "l2", as many as stay in it.
    us, us_p10, us_p90: microseconds a call, over n samples. bytes: what the op must move. gbps: bytes / us.
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
    gpu: str
    torch: str
    triton: str
    version: str
    command: str


@dataclass(frozen=True)
class LayerRecord:
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
    gpu: str
    torch: str
    triton: str
    version: str
    command: str


@dataclass(frozen=True)
class VllmRecord:
    """One setting of vLLM at one batch size: a step that decodes `batch` requests, over n windows of steps.

    setting: "default", "off" (vLLM without its norm-quant fusion), "unfused" (without that of silu either) or
        "normquant", with its policy, else "".
    linear: the block-FP8 kernel that vLLM was seen to use. layers: all of them; moe: whether some have experts.
    gpu_us_per_step: microseconds in which a kernel ran, and of them by class; sum_us_per_step: the sum of all kernels'
        lengths, more where kernels overlap. kernels: a step. tpot_ms: wall time of a step.
    prefill_ms, prefill_gpu_us: one prompt, by its tokens.
    logit_error: norm of the difference to a float32 run over that run's norm; p10, p90: of single positions.
    scales, scales_not_power_of_two: activation scales that reached DeepGEMM in a run beside the measurement.
    findings: of `normquant audit` in the code that vLLM generated, by rule.
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
    gpu: str
    torch: str
    triton: str
    version: str
    command: str


Record = KernelRecord | LayerRecord | VllmRecord
SUITES: dict[str, type[Record]] = {"kernels": KernelRecord, "layer": LayerRecord, "vllm": VllmRecord}


def current_run(version: str) -> Run:
    """The run that this process is."""
    import triton

    return Run(torch.cuda.get_device_name(), torch.__version__, triton.__version__, version, current_command())


def current_command() -> str:
    """The command line of this process, without where its results go."""
    words = iter(sys.argv[1:])
    return " ".join(["normquant", *(w for w in words if not (w in ("--output", "--keep") and next(words, "")))])


def time_fields(timing: Timing, digits: int) -> dict[str, Any]:
    """The fields of a record that are a timing, microseconds rounded to `digits`."""
    return {name: round(value, digits) for name, value in asdict(timing).items()}


def timing_fields(timing: Timing, moved: int) -> dict[str, Any]:
    """The fields of a kernel's record that come from a timing; `moved` is in bytes."""
    return time_fields(timing, 3) | {"bytes": moved, "gbps": round(moved / timing.us / 1e3, 1)}


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Callable[[Iterable[Record]], None]]:
    """A function that appends records to `path`.part, which becomes `path` at the end.

    What was measured before an interruption stays in the .part file, and `path` stays as it was.
    """
    part = path.with_suffix(path.suffix + ".part")
    with part.open("w") as file:

        def add(records: Iterable[Record]) -> None:
            file.writelines(json.dumps(asdict(r)) + "\n" for r in records)
            file.flush()

        yield add
    os.replace(part, path)


def read(path: Path) -> Iterator[dict]:
    """The records of a file; raises ValueError naming the line that is none."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error.msg}") from None
        if not isinstance(record, dict) or "suite" not in record:
            raise ValueError(f"{path}:{number}: not a record: it has no 'suite'")
        yield record


def problems(record: dict) -> list[str]:
    """What is wrong with a record: fields missing, unknown or mistyped, figures that contradict each other."""
    if record["suite"] not in SUITES:
        return [f"unknown suite {record['suite']!r}; known: {', '.join(SUITES)}"]
    types = {f.name: f.type for f in fields(SUITES[record["suite"]])}
    found = [f"missing {name}" for name in types if name not in record]
    found += [f"unknown {name}" for name in record if name not in types]
    if found:
        return found
    found += [f"{n} is {record[n]!r}" for n, t in types.items() if not _is(t, record[n])]
    us = "gpu_us_per_step" if "gpu_us_per_step" in types else "us"
    if not found and not record["us_p10"] <= record[us] <= record["us_p90"]:
        found.append(f"{us} is outside of us_p10 .. us_p90")
    if not found and "classes" in types and abs(sum(record["classes"].values()) - record[us]) > 0.03 * record[us]:
        found.append(f"classes do not add up to {us}")
    if (
        not found
        and "gbps" in record
        and abs(record["bytes"] / record["us"] / 1e3 - record["gbps"]) > 0.01 * record["gbps"] + 0.1
    ):
        found.append("gbps is not bytes / us")
    return found


def _is(name: Any, value: object) -> bool:
    """Whether a value out of JSON is of the type that a field names."""
    if name.startswith("dict"):
        of = name.removeprefix("dict[str, ").removesuffix("]")
        return isinstance(value, dict) and all(isinstance(k, str) and _is(of, v) for k, v in value.items())
    types: dict[str, tuple[type, ...]] = {
        "str": (str,),
        "int": (int,),
        "bool": (bool,),
        "float": (int, float),
        "float | None": (int, float, type(None)),
    }
    return isinstance(value, types[name])
