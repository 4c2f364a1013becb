"""Measurements as JSON lines, one record a line, and their schema."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
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
    replay_us: the captured step, replayed back to back with no host in between; None where vLLM captured none.
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
def writing(path: Path | None) -> Iterator[Callable[[Iterable[Record]], None]]:
    """A function that appends records to `path`.part, which becomes `path` at the end; None writes nothing.

    What was measured before an interruption stays in the .part file, and `path` stays as it was; so it does where
    nothing was measured at all.
    """
    if path is None:
        yield lambda records: None
        return
    part = path.with_suffix(path.suffix + ".part")
    try:
        with part.open("w") as file:

            def add(records: Iterable[Record]) -> None:
                file.writelines(json.dumps(_figures_first(r)) + "\n" for r in records)
                file.flush()

            yield add
        if part.stat().st_size:
            os.replace(part, path)
    finally:
        if part.exists() and not part.stat().st_size:
            part.unlink()


def _figures_first(record: Record) -> dict[str, Any]:
    """The fields of a record as they are written, those of the provenance at the end."""
    values = asdict(record)
    for own in fields(Provenance):
        values[own.name] = values.pop(own.name)
    return values


def read(path: Path, needed: Iterable[str] = ()) -> Iterator[dict]:
    """The records of a file.

    needed: names of fields; each that a record's suite has must be there, of its type, and a time above zero.
    Raises ValueError naming the line that is no such record.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not JSON lines, but bytes that are no UTF-8") from None
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line, parse_constant=_no_number)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not JSON: {getattr(error, 'msg', error)}") from None
        if not isinstance(record, dict) or not isinstance(record.get("suite"), str):
            raise ValueError(f"{path}:{number}: not a record: it has no 'suite'")
        if needed and (found := _unusable(record, needed)):
            raise ValueError(f"{path}:{number}: not a usable record: {found[0]}")
        yield record


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _unusable(record: dict, needed: Iterable[str]) -> list[str]:
    if record["suite"] not in SUITES:
        return [_unknown_suite(record)]
    types = _types(record)
    wanted = {name: types[name] for name in needed if name in types}
    return _mistyped(record, wanted) or [f"{n} is {record[n]}" for n in wanted if n in TIMES and record[n] <= 0]


def problems(record: dict) -> list[str]:
    """What is wrong with a record: fields missing, unknown or mistyped, figures that contradict each other."""
    if record["suite"] not in SUITES:
        return [_unknown_suite(record)]
    types = _types(record)
    found = _missing(record, types)
    found += [f"unknown {name}" for name in record if name not in types]
    return found or _mistyped(record, types) or _contradictions(record)[:1]


def _contradictions(record: dict) -> list[str]:
    name = next(name for name in TIMES if name in record)
    us, found = record[name], []
    if not record["us_p10"] <= us <= record["us_p90"]:
        found.append(f"{name} is outside of us_p10 .. us_p90")
    if "classes" in record and abs(sum(record["classes"].values()) - us) > 0.03 * us:
        found.append(f"classes do not add up to {name}")
    if "gbps" in record and abs(record["bytes"] / us / 1e3 - record["gbps"]) > 0.01 * record["gbps"] + 0.1:
        found.append("gbps is not bytes / us")
    return found


def _unknown_suite(record: dict) -> str:
    return f"unknown suite {record['suite']!r}; known: {', '.join(SUITES)}"


def _types(record: dict) -> dict[str, Any]:
    return {f.name: f.type for f in fields(_kind(record))}


def _kind(record: dict) -> type[Record]:
    return RanksRecord if "ranks" in record else SUITES[record["suite"]]


def _mistyped(record: dict, types: Mapping[str, Any]) -> list[str]:
    return _missing(record, types) or [
        f"{n} is {record[n]!r}" for n, t in types.items() if n in record and not _is(t, record[n])
    ]


def _missing(record: dict, types: Mapping[str, Any]) -> list[str]:
    """Fields that later versions added have a default: older records lack them."""
    needed = [f.name for f in fields(_kind(record)) if f.default is MISSING and f.default_factory is MISSING]
    return [f"missing {name}" for name in types if name not in record and name in needed]


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
    if isinstance(value, bool):  # which is an int to Python
        return name == "bool"
    return isinstance(value, types[name]) and not (isinstance(value, float) and not math.isfinite(value))
