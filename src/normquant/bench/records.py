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


Record = KernelRecord | LayerRecord
SUITES: dict[str, type[Record]] = {"kernels": KernelRecord, "layer": LayerRecord}


def current_run(version: str) -> Run:
    """The run that this process is."""
    import triton

    return Run(torch.cuda.get_device_name(), torch.__version__, triton.__version__, version, current_command())


def current_command() -> str:
    """The command line of this process, without where its records go."""
    words = iter(sys.argv[1:])
    return " ".join(["normquant", *(w for w in words if not (w == "--output" and next(words, "")))])


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
    python: dict[Any, Any] = {
        "str": str,
        "int": int,
        "bool": bool,
        "float": (int, float),
        "float | None": (int, float, type(None)),
    }
    found += [f"{n} is {record[n]!r}" for n, t in types.items() if not isinstance(record[n], python[t])]
    if not found and not record["us_p10"] <= record["us"] <= record["us_p90"]:
        found.append("us is outside of us_p10 .. us_p90")
    if (
        not found
        and "gbps" in record
        and abs(record["bytes"] / record["us"] / 1e3 - record["gbps"]) > 0.01 * record["gbps"] + 0.1
    ):
        found.append("gbps is not bytes / us")
    return found
