"""What no kernel can beat: an empty kernel, and copies that move as many bytes as a case."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import triton
import triton.language as tl

from normquant.bench.timing import Call

ROWS = 512  # of 16 bytes, that a program copies


@triton.jit
def empty_kernel():
    pass


@triton.jit(do_not_specialize=["n"])
def copy_kernel(src_ptr, dst_ptr, n, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    # [n, 4] int32: a mask shared by four neighbours keeps the accesses 16 bytes wide
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    at = row * 4 + tl.arange(0, 4)[None, :]
    tl.store(dst_ptr + at, tl.load(src_ptr + at, mask=row < n), mask=row < n)


def empty() -> Sequence[Call]:
    """A launch of a kernel that does nothing: the floor of every time."""
    return [partial(empty_kernel[(1,)], num_warps=1)]


def torch_copy(moved: int, sets: int) -> Sequence[Call]:
    """`copy_` of moved/2 bytes, so that `moved` bytes are read and written."""
    return [partial(d.copy_, s) for s, d in _buffers(moved, sets)]


def triton_copy(moved: int, sets: int) -> Sequence[Call]:
    """The same with a Triton kernel, 16 bytes an access."""

    def call(src: torch.Tensor, dst: torch.Tensor) -> None:
        copy_kernel[(triton.cdiv(len(src), ROWS),)](src, dst, len(src), ROWS=ROWS, num_warps=8)

    return [partial(call, s, d) for s, d in _buffers(moved, sets)]


def _buffers(moved: int, sets: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    shape = (max(1, moved // 32), 4)  # of int32: 16 bytes a row, and half of what is moved
    make = lambda: torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device="cuda")  # noqa: E731
    return [(make(), torch.empty(shape, dtype=torch.int32, device="cuda")) for _ in range(sets)]
