"""Makes this process see a GPU that it does not have: enough to generate code for it, not to run anything.

Everything that is replaced is restored when the context ends, however it ends.
"""

import contextlib
import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from normquant.audit.targets import Target, Unavailable

_GUARD_SOURCE = """#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>);
}
"""


@contextlib.contextmanager
def fake_gpu(target: Target) -> Iterator[None]:
    """Within: torch, Inductor and Triton see one idle GPU of kind `target`. Needs triton, not CUDA."""
    _require_triton()
    ensure_device_guard()
    with contextlib.ExitStack() as stack:
        stack.callback(_clear_device_caches)
        _patch_torch(stack, target)
        _patch_inductor(stack, target)
        _patch_triton(stack, target)
        _clear_device_caches()
        yield


def _require_triton() -> None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise Unavailable("generating GPU code needs triton: pip install 'normquant[nogpu]'") from error


def _always(value: Any) -> Any:
    return lambda *args, **kwargs: value


def _replace(stack: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    """Replace an attribute until the stack closes, if this torch version has it."""
    if hasattr(owner, name):
        stack.enter_context(mock.patch.object(owner, name, value))


def _device_answers(target: Target) -> dict[str, Any]:
    """What both torch.cuda and Inductor's device interface return for the same questions."""
    return {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_properties": target.properties(),
        "is_bf16_supported": True, "synchronize": None,
    }  # fmt: skip


def _patch_torch(stack: contextlib.ExitStack, target: Target) -> None:
    import torch._subclasses.fake_tensor as fake_tensor
    import torch.fx.experimental.proxy_tensor as proxy_tensor

    answers = _device_answers(target) | {
        "get_device_capability": target.capability, "get_device_name": target.device_name,
        "get_arch_list": [f"sm_{target.compute_capability}"], "is_initialized": False, "is_tf32_supported": True,
        "is_current_stream_capturing": False, "set_device": None, "_exchange_device": 0, "_maybe_exchange_device": 0,
        "_lazy_init": None, "set_rng_state": None,
    }  # fmt: skip
    for name, answer in answers.items():
        _replace(stack, torch.cuda, name, _always(answer))
    _replace(stack, torch.cuda, "get_rng_state", lambda *args, **kwargs: torch.empty(0))
    _replace(stack, torch.version, "cuda", torch.version.cuda or "13.0")
    _replace(stack, fake_tensor, "init_gpu_context", _always(None))
    # Else a fake tensor that was made of numbers, whose values torch keeps, is really copied to the GPU.
    never_on_gpu = property(_always(True), _always(None))
    mode = fake_tensor.FakeTensorMode
    stack.enter_context(mock.patch.object(mode, "avoid_device_init", never_on_gpu, create=True))
    _replace(stack, proxy_tensor, "unset_fake_temporarily", _constants_on_cpu)  # in which tracing computes constants


class CreatesOnCpu(TorchDispatchMode):
    """Creates on the CPU every tensor that would be created on a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def cpu(value: Any) -> Any:
            return torch.device("cpu") if isinstance(value, torch.device) and value.type == "cuda" else value

        moved = {name: cpu(value) for name, value in (kwargs or {}).items()}
        return func(*(cpu(arg) for arg in args), **moved)


@contextlib.contextmanager
def _constants_on_cpu() -> Iterator[Any]:
    with unset_fake_temporarily() as mode, CreatesOnCpu():
        yield mode


def _run_on_cpu(method: Any) -> Any:
    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        with CreatesOnCpu():
            return method(*args, **kwargs)

    return run


def _patch_inductor(stack: contextlib.ExitStack, target: Target) -> None:
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.fx_passes import joint_graph
    from torch._inductor.runtime import triton_helpers

    answers = _device_answers(target) | {
        "get_compute_capability": target.compute_capability, "is_triton_capable": True, "get_raw_stream": 0,
        "raise_if_triton_unavailable": None,
    }  # fmt: skip
    for name, answer in answers.items():
        _replace(stack, CudaInterface, name, staticmethod(_always(answer)))
    for name in ("current_device", "get_device_properties"):
        _replace(stack, CudaInterface.Worker, name, staticmethod(_always(answers[name])))
    _replace(stack, triton_helpers, "set_driver_to_gpu", _always(None))
    # Constant folding computes with real tensors of one element on the graph's device; any device gives the result.
    folder = joint_graph.UniformValueConstantFolder
    for name in ("__init__", "run"):
        _replace(stack, folder, name, _run_on_cpu(getattr(folder, name)))
    # Inductor traces its attention and matmul-padding patterns on real GPU tensors, once per process. They are skipped
    # by replacing the function, not by calling it, so that a later real compile still traces them.
    _replace(stack, joint_graph, "lazy_init", _always(None))


def _patch_triton(stack: contextlib.ExitStack, target: Target) -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    class NoDriver:
        """Answers what the compiler asks of a driver; nothing can be launched."""

        get_current_target = staticmethod(_always(GPUTarget("cuda", target.compute_capability, 32)))
        get_current_device = staticmethod(_always(0))
        get_current_stream = staticmethod(_always(0))
        get_active_torch_device = staticmethod(_always(torch.device("cuda", 0)))
        is_active = staticmethod(_always(True))

    _replace(stack, triton.runtime.driver, "_active", NoDriver())


def _clear_device_caches() -> None:
    """Clear cached answers about the device: the real ones before, the fake ones after."""
    import torch.utils._triton as triton_queries
    from torch._inductor.runtime.hints import DeviceProperties

    for query in (DeviceProperties.create, *vars(triton_queries).values()):
        clear = getattr(query, "cache_clear", None)
        if clear is not None and not isinstance(query, functools.partial):
            clear()


def guard_dir() -> Path:
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
def ensure_device_guard() -> None:
    """Make CUDA device guards available in this process; Unavailable where that needs a C++ compiler and has none.

    torch's dispatcher needs a guard for each device type that it meets. CUDA builds can install a no-op one; a CPU-only
    build has none, and registering one takes a line of C++, compiled once per torch version.
    """
    if torch.version.cuda is not None:
        torch._C._ensureCUDADeviceGuardSet()
        return
    library = guard_dir() / f"noop-cuda-guard-{torch.__version__}.so"
    if not library.exists():
        _compile_guard(library)
    ctypes.CDLL(str(library))


def _compile_guard(library: Path) -> None:
    compiler = os.environ.get("CXX") or next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    if compiler is None:
        raise Unavailable(
            "a CPU-only torch needs a C++ compiler once to generate GPU code: install c++, g++ or clang++, or set CXX"
        )
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:  # same file system: the rename below is atomic
        source, built = Path(scratch) / "guard.cpp", Path(scratch) / "guard.so"
        source.write_text(_GUARD_SOURCE)
        command = [compiler, "-std=c++20", "-shared", "-fPIC", str(source), f"-I{root / 'include'}"]
        command += [f"-L{root / 'lib'}", "-lc10", "-o", str(built)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise Unavailable(f"{compiler} could not compile the one-line device guard: {done.stderr.strip()[-400:]}")
        os.replace(built, library)
