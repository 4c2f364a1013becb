"""The machine code that a kernel becomes on a GPU that need not be there.

Kernels are launched on CPU tensors and compiled by Triton's own JIT, specialized as on the GPU; the driver alone is a
stand-in, and the launch is left out. `ptxas`, `cuobjdump` and `nvdisasm` come with the Triton wheel.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import SimpleNamespace
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from normquant import kernels
from normquant.kernels.capability import LaunchTarget

SM_90, SM_100 = (9, 0), (10, 0)
KERNEL_MODULES = [import_module(f"{kernels.__name__}.{module.name}") for module in iter_modules(kernels.__path__)]
_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_WIDTH = re.compile(r"\.(?:(256|128|64)|[US](16|8))\b")  # of a SASS access; one without a suffix is 32 bits wide


@dataclass(frozen=True)
class Code:
    """One compiled kernel: its PTX and what `cuobjdump -res-usage` counts. The SASS takes half a second; it is made
    when it is looked at."""

    options: object
    ptx: str
    cubin: bytes
    registers: int
    stack: int
    local: int
    threads: int

    @property
    def sass(self) -> tuple[str, ...]:
        """One instruction a line."""
        return _disassemble(self.cubin)

    def places(self, opcode: str) -> list[int]:
        """Line numbers of the SASS instructions whose opcode starts with `opcode`."""
        return [i for i, line in enumerate(self.sass) if re.search(rf"(?:^|\s){opcode}(?:\.|\s|$)", line)]

    def widths(self, opcode: str) -> list[int]:
        """Width in bits of every global access with this opcode, LDG or STG."""
        return [_width(self.sass[i]) for i in self.places(opcode)]


def _width(line: str) -> int:
    found = _WIDTH.search(line.split("[")[0])
    return int(found[1] or found[2]) if found else 32


@cache
def _disassemble(cubin: bytes) -> tuple[str, ...]:
    text = _told("nvdisasm", "-c", cubin)
    return tuple(line.strip() for line in re.findall(r"/\*[0-9a-f]{4,}\*/(.*?);", text))


@cache
def _usage(cubin: bytes) -> dict[str, int]:
    text = _told("cuobjdump", "-res-usage", cubin)
    return {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


def _told(tool: str, flag: str, cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([_BIN / tool, flag, path], capture_output=True, text=True, check=True).stdout


def code(kernel: triton.compiler.CompiledKernel) -> Code:
    """What Triton compiled."""
    counts = _usage(kernel.asm["cubin"])
    return Code(
        options=kernel.metadata,
        ptx=kernel.asm["ptx"],
        cubin=kernel.asm["cubin"],
        registers=counts["REG"],
        stack=counts["STACK"],
        local=counts["LOCAL"],
        threads=32 * kernel.metadata.num_warps,
    )


@contextlib.contextmanager
def on_target(capability: tuple[int, int]) -> Iterator[None]:
    """Within: tensors on the CPU count as tensors on a GPU of this compute capability."""
    with contextlib.ExitStack() as stack:
        for module in KERNEL_MODULES:
            if hasattr(module, "target"):
                stack.enter_context(mock.patch.object(module, "target", lambda device: LaunchTarget(True, capability)))
        yield


@contextlib.contextmanager
def compiling(capability: tuple[int, int]) -> Iterator[list]:
    """Within: kernels are compiled for `capability` instead of launched; yields what was compiled.

    A launch that Triton's in-memory cache serves adds the same object again.
    """
    assert not triton.knobs.runtime.interpret, "TRITON_INTERPRET is set: kernels are interpreted, not compiled"
    stock, compiled, number = JITFunction.run, [], 10 * capability[0] + capability[1]

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled.append(stock(self, *args, grid=grid, warmup=True, **kwargs))

    # Triton keeps one cache for each device number: the capability as the number keeps the targets apart.
    driver = SimpleNamespace(
        get_current_device=lambda: number,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", number, 32),
    )
    with (
        mock.patch.object(triton.runtime.driver, "_active", driver),
        mock.patch.object(JITFunction, "run", compile_only),
        on_target(capability),
    ):
        yield compiled


def machine_code(launch: Callable[[], object], capability: tuple[int, int]) -> Code:
    """The code of the one kernel that `launch` launches."""
    with compiling(capability) as compiled:
        launch()
    (kernel,) = compiled
    return code(kernel)
