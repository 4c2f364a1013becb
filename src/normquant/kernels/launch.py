"""Which launch config a kernel gets, and what a launch needs to know about its device.

Configs change speed and never a bit of the result. They come from a committed table for each compute capability,
measured by the tuner; what the table lacks follows the rule in `_rule`.
"""

from __future__ import annotations

import json
import sys
from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

import torch

from normquant.spec import QuantSpec

MIN_CAPABILITY = (8, 9)  # the first with e4m3 conversions
MAX_ROW = 65536  # values of a normed row, which one program holds in registers
PDL_CAPABILITY = (9, 0)  # the first with programmatic dependent launch
CLUSTER_CAPABILITY = (9, 0)  # the first with thread block clusters
MAX_CLUSTER = 8  # programs, on every such GPU
# When the next kernel may be scheduled: before this one waits for the one before it, right after, or when it has loaded
# its inputs.
RELEASES = ("start", "waited", "loaded")
KEPT_SUM = 4 << 20  # bytes of x + residual that the L2 is asked to keep at the most, of 50 MB on an H100


@dataclass(frozen=True)
class Config:
    """How a kernel is launched. Fields change its speed and no bit of its result.

    num_warps: warps of a program.
    split: over how many programs a row is split.
    rows: how many rows a program takes, a power of two, one where a row is split.
    prefetch: whether a norm asks the L2 for its row while the kernel before it is still running, which pays where few
        rows leave the GPU idle.
    late_weight: whether a norm reads its weight only when the sum of squares is there, which leaves registers for more
        programs where many rows fill the GPU.
    evict_first: whether a norm says that nobody reads x and the residual again, so that the L2 keeps what is written.
    release: when the next kernel may be scheduled, one of RELEASES. The earlier, the more time a GEMM has to set itself
        up, and the longer it takes a place from others.
    tiles: in how many tiles at the most a norm holds a row, each a power of two of groups: 40 groups are one tile of
        64, or two of 32 and 8 without idle lanes.
    keep_sum: whether the L2 keeps x + residual as long as it can, for the next norm, two GEMMs later.
    cluster: whether the programs of a split row exchange their sums of squares, where the GPU can, so that each reads
        its own part of the row only.
    """

    num_warps: int
    split: int = 1
    rows: int = 1
    prefetch: bool = False
    late_weight: bool = False
    evict_first: bool = False
    release: str = "loaded"
    tiles: int = 1
    keep_sum: bool = False
    cluster: bool = False

    def __post_init__(self) -> None:
        if self.release not in RELEASES:
            raise ValueError(f"{self}: release is one of {', '.join(RELEASES)}")
        if self.rows > 1 and (self.split > 1 or self.prefetch):
            raise ValueError(f"{self}: several rows for a program go with neither a split nor a prefetch")
        if self.cluster and not 1 < self.split <= MAX_CLUSTER:
            raise ValueError(f"{self}: a cluster takes 2 to {MAX_CLUSTER} programs")
        if self.evict_first and self.split > 1 and not self.cluster:
            raise ValueError(f"{self}: the programs of a split row read it more than once")
        if self.tiles > 1 and self.split > 1:
            raise ValueError(f"{self}: the programs of a split row hold it in one tile")


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


def has_clusters(capability: tuple[int, int] | None) -> bool:
    """Whether GPUs of a compute capability have thread block clusters."""
    return capability is not None and capability >= CLUSTER_CAPABILITY


@dataclass(frozen=True)
class Target:
    """The part of a device that a launch depends on; capability is None for Triton's interpreter on CPU."""

    on_cuda: bool
    capability: tuple[int, int] | None

    @property
    def pdl(self) -> bool:
        """Whether kernels are launched with programmatic dependent launch."""
        return self.capability is not None and self.capability >= PDL_CAPABILITY

    @property
    def clusters(self) -> bool:
        """Whether programs can be launched in clusters."""
        return has_clusters(self.capability)

    def release(self, config: Config) -> str:
        """When the next kernel may be scheduled: as `_device.wait_for_predecessor` takes it."""
        return config.release if self.pdl else ""

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


def config(op: str, k: int, m: int, capability: tuple[int, int] | None) -> Config:
    """The config of `op` for [m, k] on a compute capability: the table's if it has (op, k), else the rule's."""
    limits, configs = _rows(op, k, capability)
    return configs[bisect_left(limits, m)]


def configs(op: str, k: int, capability: tuple[int, int] | None) -> list[Config]:
    """Every config that `op` has for rows of k values, however many rows there are."""
    return list(dict.fromkeys(_rows(op, k, capability)[1]))


@cache
def _rows(op: str, k: int, capability: tuple[int, int] | None) -> tuple[list[int], list[Config]]:
    # The largest M of each row but the last, which has no upper limit, and the rows' configs.
    table = _table(capability).get(op, {}).get(str(k), []) if capability else []
    rows = [(limit, Config(*fields)) for limit, *fields in table]
    rows = rows or [(m, _rule(op, k, m, has_clusters(capability))) for m in _RULE_LIMITS]
    rows[-1] = sys.maxsize, rows[-1][1]
    if kept := rows_kept(op, k):
        rows = _keeping(kept, rows)
    return [limit for limit, _ in rows[:-1]], [config for _, config in rows]


def rows_kept(op: str, k: int) -> int:
    """Up to how many rows `op` has keep_sum."""
    return KEPT_SUM // (2 * k) if op.startswith("add_") else 0


def _keeping(m: int, rows: list[tuple[int, Config]]) -> list[tuple[int, Config]]:
    # The same rows with keep_sum up to M, the row over it cut in two.
    below = [limit for limit, _ in rows if limit < m]
    kept = [(min(limit, m), replace(config, keep_sum=True)) for limit, config in rows[: len(below) + 1]]
    return kept + [row for row in rows if row[0] > m]


@cache
def _table(capability: tuple[int, int]) -> dict[str, dict[str, list[list[Any]]]]:
    # {op: {K: [[largest M, *fields of a Config], ...]}}, defaults at the end left out, ascending in M
    file = resources.files("normquant.kernels") / "configs" / f"sm{capability[0]}{capability[1]}.json"
    return json.loads(file.read_text()) if file.is_file() else {}


_RULE_LIMITS = (16, 128, 256, 257)  # up to how many rows the rule gives one config; the last is all above


def _rule(op: str, k: int, m: int, clusters: bool) -> Config:
    # Few long rows: each over several programs, so that one row's latency is short. Else, few rows: many warps. Many
    # rows: fewer warps and no idle lanes, so that several programs share a multiprocessor.
    per_warp = 512 if m <= 256 else 1024
    num_warps = min(32, power_of_two_in(max(4, k // per_warp)))
    if "rms_norm_quant" in op and k >= 4096:
        if clusters and m <= 128:  # 8 values a thread, a load of 16 bytes
            return Config(power_of_two(-(-k // MAX_CLUSTER)) // 256, split=MAX_CLUSTER, cluster=True)
        if m <= 16:
            return Config(num_warps, split=4)
    return Config(num_warps, tiles=1 if m <= 256 else 3)


def _log_warps(tiles: tuple[int, ...], own: tuple[int, ...], spec: QuantSpec, config: Config) -> tuple[int, ...]:
    """For each tile of a row log2 of how many neighbours one warp holds, in the layout that Triton gives the tile.

    A thread has 16 neighbours, the width of an fp8 store, or 8 where the tile is only loaded or there are more threads.
    A wrong answer costs time and no bit of the result.
    """
    width = 16 if tiles == own else 8

    def of_tile(groups: int) -> int:
        n = groups * spec.group
        per_thread = max(1, min(width, config.rows * n // (32 * config.num_warps)))
        return min(log2(n), log2(32 * power_of_two(per_thread)))

    return tuple(of_tile(groups) for groups in tiles)


def stride_unit(*tensors: torch.Tensor | None) -> int:
    """8 where every row stride is a multiple of 8 elements, so that rows may be read 16 bytes at a time, else 1.

    The stride of a single row says nothing.
    """
    for t in tensors:
        if t is not None and t.stride(0) % 8 and t.shape[0] != 1:
            return 1
    return 8


def own_groups(k: int, spec: QuantSpec, config: Config) -> tuple[int, int]:
    """Groups that one program writes, a power of two, and how many programs then cover a row of k values."""
    groups = k // spec.group
    block = power_of_two(-(-groups // config.split))
    block = max(spec.scales_per_element, block)  # a program writes whole elements of the scale
    return block, -(-groups // block)


@cache
def unsplit(config: Config) -> Config:
    """The same config for a row that one program takes."""
    return replace(config, split=1)


def group_blocks(m: int, k: int, spec: QuantSpec, config: Config) -> tuple[int, int]:
    """The same where a program takes neighbouring groups of any rows: its groups, and programs for all m rows."""
    block = own_groups(k, spec, config)[0] * config.rows
    per = spec.scales_per_element
    return block, -(-m * spec.scale_shape(m, k)[1] * per // block)


@dataclass(frozen=True)
class Rows:
    """How programs divide rows between them.

    tiles: groups of each tile that a program reads. own: of each that it writes. log_warps: for each of `tiles` log2 of
    the neighbours that one warp holds. programs: how many share a row. cluster: how many of them are a cluster, each
    reading its own part; one where each reads the whole row.
    """

    tiles: tuple[int, ...]
    own: tuple[int, ...]
    log_warps: tuple[int, ...]
    programs: int
    cluster: int = 1


@cache
def divided(k: int, spec: QuantSpec, config: Config, clusters: bool = False) -> Rows:
    """How a config divides rows of k values; raises ValueError for a row that is too long.

    clusters: whether the kernel and its GPU do as the config says about them.
    """
    block, programs = own_groups(k, spec, config)
    per = spec.scales_per_element  # a tile holds whole elements of the scale
    tiles, left = [], k // spec.group
    while len(tiles) < config.tiles - 1 and per <= (largest := power_of_two_in(left)) < left:
        tiles.append(largest)
        left -= largest
    tiles.append(max(power_of_two(left), per))
    if sum(tiles) * spec.group > MAX_ROW:
        raise ValueError(f"K is {k}; the norm kernels hold a row in registers and take at most {MAX_ROW}")
    whole = tuple(tiles)
    own = whole if config.split == 1 else (block,)
    cluster = programs if clusters and config.cluster else 1
    read = whole if cluster == 1 else own
    return Rows(read, own, _log_warps(read, own, spec, config), programs, cluster)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def power_of_two_in(n: int) -> int:
    """The largest power of two that is at most n, which is at least 1."""
    return 1 << n.bit_length() - 1


def log2(n: int) -> int:
    """Base-2 logarithm of a power of two."""
    return n.bit_length() - 1
