"""How a launch config divides rows between programs, and a row into tiles."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import torch

from normquant.spec import QuantSpec

if TYPE_CHECKING:
    from normquant.kernels.configs import Config

MAX_ROW = 65536  # values of a normed row, which one program holds in registers


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def power_of_two_in(n: int) -> int:
    """The largest power of two that is at most n, which is at least 1."""
    return 1 << n.bit_length() - 1


def log2(n: int) -> int:
    """Base-2 logarithm of a power of two."""
    return n.bit_length() - 1


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


def group_blocks(m: int, k: int, spec: QuantSpec, config: Config, least: int = 1) -> tuple[int, int]:
    """The same where a program takes neighbouring groups of any rows, `least` of them or more, a power of two: its
    groups, and programs for all m rows."""
    block = max(own_groups(k, spec, config)[0] * config.rows, least)
    per = spec.scales_per_element
    return block, -(-m * spec.scale_shape(m, k)[1] * per // block)


@dataclass(frozen=True)
class RowTiling:
    """How the programs of a kernel divide rows among them.

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
def divided(k: int, spec: QuantSpec, config: Config, clusters: bool = False) -> RowTiling:
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
    return RowTiling(read, own, _log_warps(read, own, spec, config), programs, cluster)


def _log_warps(tiles: tuple[int, ...], own: tuple[int, ...], spec: QuantSpec, config: Config) -> tuple[int, ...]:
    """For each tile of a row log2 of how many neighbours one warp holds, in the layout that Triton gives the tile.

    A thread has 16 neighbours, the width of an fp8 store, or 8 where the tile is only loaded or there are more threads.
    A wrong answer costs time and no bit of the result.
    """
    width = 16 if tiles == own else 8

    sizes = [groups * spec.group for groups in tiles]
    return tuple(log_warp(n, config.rows * n, config.num_warps, width) for n in sizes)


def log_warp(n: int, values: int, num_warps: int, width: int = 16) -> int:
    """log2 of how many of n neighbours one warp holds, of a tile of `values` of which a thread has up to `width`."""
    per_thread = max(1, min(width, values // (32 * num_warps)))
    return min(log2(n), log2(32 * power_of_two(per_thread)))
