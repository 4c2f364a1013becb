"""Which launch config a kernel gets, and what a launch needs to know about its device.

Configs change speed and never a bit of the result. They come from a committed table for each compute capability,
measured by the tuner; what the table lacks follows the rule in `_rule`.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import torch

from normquant.spec import QuantSpec

MIN_CAPABILITY = (8, 9)  # the first with e4m3 conversions
MAX_ROW = 65536  # values of a normed row, which one program holds in registers
PDL_CAPABILITY = (9, 0)  # the first with programmatic dependent launch


@dataclass(frozen=True)
class Config:
    """num_warps of a program, over how many programs a row is split, and how many rows a program takes.

    rows: a power of two, one where a row is split. prefetch: whether a norm asks the L2 for its row while the kernel
    before it is still running, which pays where few rows leave the GPU idle. late_weight: whether a norm reads its
    weight only when the sum of squares is there, which leaves registers for more programs where many rows fill the GPU.
    evict_first: whether a norm says that nobody reads x and the residual again, so that the L2 keeps what is written.
    early_release: whether the next kernel is scheduled while this one still waits for the one before it, and not when
    this one has loaded its inputs: time for a GEMM to set itself up, and a place that it takes from others.
    """

    num_warps: int
    split: int = 1
    rows: int = 1
    prefetch: bool = False
    late_weight: bool = False
    evict_first: bool = False
    early_release: bool = False

    def __post_init__(self) -> None:
        if self.rows > 1 and (self.split > 1 or self.prefetch):
            raise ValueError(f"{self}: several rows for a program go with neither a split nor a prefetch")
        if self.evict_first and self.split > 1:
            raise ValueError(f"{self}: the programs of a split row read it more than once")


class Constant(str):
    """A QuantSpec as the compile-time constant of a kernel: its text, which has the spec's fields.

    Triton's hooks, such as serving engines set to watch for compiles, write a kernel's constants as JSON.
    """

    spec: QuantSpec

    def __getattr__(self, name: str) -> Any:
        return getattr(self.spec, name)


@cache
def constant(spec: QuantSpec) -> Constant:
    """The constant that stands for a spec."""
    text = Constant(spec.encode())
    text.spec = spec
    return text


@dataclass(frozen=True)
class Target:
    """The part of a device that a launch depends on; capability is None for Triton's interpreter on CPU."""

    on_cuda: bool
    capability: tuple[int, int] | None

    @property
    def pdl(self) -> bool:
        """Whether kernels are launched with programmatic dependent launch."""
        return self.capability is not None and self.capability >= PDL_CAPABILITY

    def release(self, config: Config) -> str:
        """When the next kernel may be scheduled: as `_device.wait_for_predecessor` takes it."""
        if not self.pdl:
            return ""
        return "start" if config.early_release else "loaded"

    def options(self, config: Config) -> dict[str, object]:
        """Launch options of Triton. Multiply-adds of the compiler's choosing are off: they round differently."""
        options: dict[str, object] = {"num_warps": config.num_warps, "enable_fp_fusion": False}
        return options | {"launch_pdl": True} if self.pdl else options


@cache
def target(device: torch.device) -> Target:
    """The launch target of a device; raises ValueError where the kernels cannot run."""
    if device.type == "cpu":
        return Target(False, None)
    if device.type != "cuda" or torch.version.hip:
        raise ValueError(f"the kernels run on NVIDIA GPUs, not on {device}")
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        raise ValueError(f"{device} has compute capability {capability}; float8_e4m3fn needs {MIN_CAPABILITY} or later")
    return Target(True, capability)


def on_device(device: torch.device):
    """A context in which Triton launches on `device`, free where it already would."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def config(op: str, k: int, m: int, capability: tuple[int, int] | None) -> Config:
    """The config of `op` for [m, k] on a compute capability: the table's if it has (op, k), else the rule's."""
    limits, configs = _rows(op, k, capability)
    return configs[bisect_left(limits, m)] if configs else _rule(op, k, m)


def configs(op: str, k: int, capability: tuple[int, int] | None) -> list[Config]:
    """Every config that `op` has for rows of k values, however many rows there are."""
    _, table = _rows(op, k, capability)
    return list(dict.fromkeys(table or [_rule(op, k, m) for m in _RULE_CHANGES]))


@cache
def _rows(op: str, k: int, capability: tuple[int, int] | None) -> tuple[list[int], list[Config]]:
    # The largest M of each row but the last, which has no upper limit, and the rows' configs; none without a table.
    rows = _table(capability).get(op, {}).get(str(k), []) if capability else []
    return [row[0] for row in rows[:-1]], [Config(*row[1:]) for row in rows]


@cache
def _table(capability: tuple[int, int]) -> dict[str, dict[str, list[list[Any]]]]:
    # {op: {K: [[largest M, *fields of a Config], ...]}}, defaults at the end left out, ascending in M
    file = resources.files("normquant.kernels") / "configs" / f"sm{capability[0]}{capability[1]}.json"
    return json.loads(file.read_text()) if file.is_file() else {}


_RULE_CHANGES = (1, 17, 257)  # rows from which the rule gives another config


def _rule(op: str, k: int, m: int) -> Config:
    # Few rows: many warps, a row over several programs, so that one row's latency is short. Many rows: fewer warps, so
    # that several programs share a multiprocessor.
    per_warp = 512 if m <= 256 else 1024
    num_warps = min(32, max(4, 1 << (k // per_warp).bit_length() - 1)) if k >= per_warp else 4
    return Config(num_warps, 4 if m <= 16 and k >= 4096 and op.endswith("rms_norm_quant") else 1)


def log_warp(n: int, stores: bool, config: Config) -> int:
    """log2 of how many neighbours in a row of n values one warp holds, in the layout that Triton gives the tile.

    A thread has 16 neighbours, the width of an fp8 store, or 8 where the tile is only loaded or there are more threads.
    A wrong answer costs time and no bit of the result.
    """
    per_thread = max(1, min(16 if stores else 8, config.rows * n // (32 * config.num_warps)))
    return min(log2(n), log2(32 * power_of_two(per_thread)))


def stride_unit(*tensors: torch.Tensor | None) -> int:
    """8 where every row stride is a multiple of 8 elements, so that rows may be read 16 bytes at a time, else 1.

    The stride of a single row says nothing.
    """
    return 8 if all(t is None or t.shape[0] == 1 or t.stride(0) % 8 == 0 for t in tensors) else 1


def own_groups(k: int, spec: QuantSpec, config: Config) -> tuple[int, int]:
    """Groups that one program writes, a power of two, and how many programs then cover a row of k values."""
    groups = k // spec.group
    block = power_of_two(-(-groups // config.split))
    block = max(spec.scales_per_element, block)  # a program writes whole elements of the scale
    return block, -(-groups // block)


def group_blocks(m: int, k: int, spec: QuantSpec, config: Config) -> tuple[int, int]:
    """The same where a program takes neighbouring groups of any rows: its groups, and programs for all m rows."""
    block = own_groups(k, spec, config)[0] * config.rows
    per = spec.scales_per_element
    return block, -(-m * spec.scale_shape(m, k)[1] * per // block)


def row_groups(k: int, spec: QuantSpec, block_g: int) -> int:
    """Groups of a row's tile, a power of two, at least `block_g`; raises ValueError for a row that is too long."""
    groups = max(power_of_two(k // spec.group), block_g)
    if groups * spec.group > MAX_ROW:
        raise ValueError(f"K is {k}; the norm kernels hold a row in registers and take at most {MAX_ROW}")
    return groups


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def log2(n: int) -> int:
    """Base-2 logarithm of a power of two."""
    return n.bit_length() - 1
