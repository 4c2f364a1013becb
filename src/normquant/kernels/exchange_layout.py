"""Sizes in the buffer that a rank's peers write to, and what the kernels know of a group."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# The start of a buffer: a word for each rank, in which it says for whom it has given up to wait.
CONTROL_BYTES = 256
UNIT_BYTES = 256  # what the size of a half is a multiple of


@dataclass(frozen=True)
class Exchange:
    """What a launch needs to know of a group: this rank among how many, and where their buffers are.

    table: int64, the addresses of all ranks' buffers, then those of the report and the deadline in ns. state: int32,
    the epoch and a counter. half: bytes of one half of a buffer, a multiple of UNIT_BYTES.
    """

    rank: int
    world: int
    table: torch.Tensor
    state: torch.Tensor
    half: int


def one_shot_bytes(m: int, k: int, world: int) -> int:
    """Bytes of half a buffer that one shot takes."""
    return m * world * 2 * k


def two_shot_bytes(m: int, k: int, world: int) -> int:
    """Bytes of half a buffer that two shots take, whatever outputs are sent."""
    rows = -(-m // world) * world
    return rows * (2 * k + k + 4 * ((k // 128 * 4 + 3) // 4 * 4) + 4 * k)
