"""This machine: its Python, CPU and GPUs, the latter as torch and nvidia-smi see them."""

from __future__ import annotations

import os
import platform
import subprocess
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normquant.cli.env.packages import one_line

SMI_TIMEOUT_S = 20  # nvidia-smi takes seconds where the driver has to be woken


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


def torch_gpus(torch: Any) -> tuple[tuple[Gpu, ...], str | None]:
    """The CUDA GPUs that torch can use, and what it complained about while looking."""
    if torch is None:
        return (), None
    with warnings.catch_warnings(record=True) as caught:  # torch warns about a driver that is too old
        warnings.simplefilter("always")
        try:
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            gpus = tuple(_torch_gpu(torch, index) for index in range(count))
        except Exception as error:
            return (), one_line(error)
    return gpus, " ".join(str(caught[0].message).split()) if caught else None


def _torch_gpu(torch: Any, index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    return Gpu(properties.name, f"{properties.major}.{properties.minor}", properties.total_memory // 2**20)


def smi_gpus() -> tuple[tuple[Gpu, ...], str | None]:
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


def cpu_model() -> str:
    """Its name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, [*models, platform.processor(), platform.machine()]), "unknown")


def usable_cores() -> int:
    """Cores this process may run on: a container's limit counts, not the machine's total."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
