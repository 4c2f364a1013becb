"""A no-op CUDA device guard, so that fake CUDA tensors can exist in a process without CUDA.

PyTorch's dispatcher needs a guard for each device type that it meets. CUDA builds can install a no-op one; a CPU-only
build has none, and registering one takes a line of C++. It is compiled once per torch version.
"""

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from normquant.audit.targets import Unavailable

_SOURCE = """#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>);
}
"""


def cache_dir() -> Path:
    """Where this user's compiled guards are kept; a folder of this process where the user has no home to keep them."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        folder = Path(base) / "normquant" / "device-guard"
        folder.mkdir(parents=True, exist_ok=True)
    except (RuntimeError, OSError):  # no home is known, or the one that is named does not exist
        return Path(_scratch().name)
    return folder


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory:  # removed when the process ends
    return tempfile.TemporaryDirectory(prefix="normquant-")


@functools.cache
def ensure() -> None:
    """Make CUDA device guards available in this process; Unavailable where that needs a C++ compiler and has none."""
    if torch.version.cuda is not None:
        torch._C._ensureCUDADeviceGuardSet()
        return
    library = cache_dir() / f"noop-cuda-guard-{torch.__version__}.so"
    if not library.exists():
        _compile(library)
    ctypes.CDLL(str(library))


def _compile(library: Path) -> None:
    compiler = os.environ.get("CXX") or next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    if compiler is None:
        raise Unavailable(
            "a CPU-only torch needs a C++ compiler once to generate GPU code: install c++, g++ or clang++, or set CXX"
        )
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:  # same file system: the rename below is atomic
        source, built = Path(scratch) / "guard.cpp", Path(scratch) / "guard.so"
        source.write_text(_SOURCE)
        command = [compiler, "-std=c++20", "-shared", "-fPIC", str(source), f"-I{root / 'include'}"]
        command += [f"-L{root / 'lib'}", "-lc10", "-o", str(built)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise Unavailable(f"{compiler} could not compile the one-line device guard: {done.stderr.strip()[-400:]}")
        os.replace(built, library)
