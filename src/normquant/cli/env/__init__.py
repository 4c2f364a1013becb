"""``normquant env``: the versions, GPUs and driver that a bug report needs, and what decides on this machine.

Nothing here fails because a package is missing or broken, or because there is no GPU or no home directory; that is what
the report then says.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from normquant.cli.env import machine, packages
from normquant.cli.env.decisions import Setting, settings
from normquant.cli.env.machine import Gpu
from normquant.cli.env.packages import PACKAGES, Package

COLLECT_TIMEOUT_S = 120  # of torch's script, which asks pip, nvidia-smi and lscpu


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
    decides: tuple[Setting, ...]
    collect_env: str | None = None  # of torch, where it is asked for


def collect(check: bool = False, full: bool = False) -> Environment:
    """Look at this machine. Never raises.

    check: also import every package in a process of its own. full: also run torch's collect_env.
    """
    torch, torch_problem = packages.import_torch()
    gpus, driver = machine.smi_gpus()
    seen_by = "nvidia-smi" if gpus else None
    torch_gpus, gpu_problem = machine.torch_gpus(torch)
    if torch_gpus:
        gpus, seen_by = torch_gpus, "torch"
    return Environment(
        normquant=packages.distribution_version(("normquant",)) or "not installed, run from its sources",
        python=f"{platform.python_version()} ({platform.python_implementation()}, {sys.executable})",
        platform=platform.platform(),
        cpu=machine.cpu_model(),
        cores=machine.usable_cores(),
        packages=tuple(packages.find(name, check, torch_problem) for name in PACKAGES),
        gpus=gpus,
        gpus_seen_by=seen_by,
        gpu_problem=gpu_problem,
        driver=driver,
        cuda=getattr(getattr(torch, "version", None), "cuda", None),
        decides=settings(gpus, os.environ),
        collect_env=_collect_env(torch is not None) if full else None,
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
    decides = [(s.name, f"{s.value} ({s.meaning})" if s.meaning else s.value) for s in e.decides]
    parts = [_aligned(rows), "What decides", _aligned(decides)]
    if e.collect_env:
        parts += ["torch.utils.collect_env", e.collect_env]
    return "\n\n".join(parts)


def _aligned(rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)


def format_json(environment: Environment) -> str:
    """The report as one JSON object with the fields of ``Environment``; ``packages`` and ``decides`` are by name."""
    record = dataclasses.asdict(environment)
    record["packages"] = {p.name: {"version": p.version, "problem": p.problem} for p in environment.packages}
    record["decides"] = {s.name: {"value": s.value, "meaning": s.meaning} for s in environment.decides}
    return json.dumps(record, indent=2)


def _collect_env(has_torch: bool) -> str:
    """What torch's own script prints, or why it printed nothing."""
    if not has_torch:
        return "torch cannot be imported"
    try:
        done = subprocess.run(
            [sys.executable, "-m", "torch.utils.collect_env"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=COLLECT_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return packages.one_line(error)
    return done.stdout.strip() or (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `normquant env`."""
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.add_argument("--check", action="store_true", help="also import every package, and report those that fail")
    parser.add_argument("--full", action="store_true", help="also what torch.utils.collect_env says")


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    environment = collect(check=args.check, full=args.full)
    print(format_json(environment) if args.json else format_text(environment))
    return 0
