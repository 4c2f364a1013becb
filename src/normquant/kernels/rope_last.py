"""Rotary position embedding of the last values of every head, the others copied: what q needs before the attention.

A row is H heads of [nope | pe], 128 + 64 values for DeepSeek-R1:

    nope  copied
    pe    rotary position embedding by the angles of the row

Bytes moved per row in bf16, D values in a head and R of them rotated: read 2HD, and 2R of cos and sin; written 2HD.

Grid: M * H / BLOCK_H. A program takes neighbouring heads, of one row or of several, and one binary does for every M.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from normquant.kernels._device import release_dependents, row_offset, wait_for_predecessor
from normquant.kernels._rope import load_angles, load_pairs, positions, rotate, store_pairs
from normquant.kernels.capability import target
from normquant.kernels.configs import Config
from normquant.kernels.launch import Plan, kernel_spec, launch, matrix, plan
from normquant.kernels.partial_rows import PartialRows, load_at, partial
from normquant.kernels.tiling import power_of_two, power_of_two_in, stride_unit
from normquant.spec import QuantSpec

CONFIG = Config(4)
VALUES = 4096  # of a program at the most: enough bytes on the way for each of its threads, registers for many programs
PARTIAL_VALUES = 1024  # where each is several partial sums in fp32


@triton.jit(do_not_specialize=["m", "stride_xm", "stride_cos", "stride_sin"])
def rope_last_kernel(
    x_ptr,  # [M, H * D] bf16 or fp16, any row stride, or partial sums of such rows
    cos_ptr,  # [positions, R/2], any row stride
    sin_ptr,  # like cos
    position_ptr,  # [M] int32 or int64, or None: row i is at position i
    out_ptr,  # [M, H * D] like x, contiguous
    m,
    stride_xm,
    stride_cos,
    stride_sin,
    H: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    ROPE: tl.constexpr,
    SPEC: tl.constexpr,
    PARTIAL: tl.constexpr,
    BLOCK_H: tl.constexpr,  # heads of a program, a power of two
    COPY_BLOCK: tl.constexpr,  # D - R, rounded up to a power of two
    R_BLOCK: tl.constexpr,  # R/2, rounded up to a power of two
    STRIDE_UNIT: tl.constexpr,
    ANGLE_UNIT: tl.constexpr,
    PDL: tl.constexpr,
    ON_CUDA: tl.constexpr,
):
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    head = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    row = head // H
    mask = row < m
    x_at = x_ptr + row_offset(row, stride_xm, STRIDE_UNIT) + head % H * D
    step = row_offset(m, stride_xm, STRIDE_UNIT)
    out_at = out_ptr + head.to(tl.int64) * D
    column = tl.arange(0, COPY_BLOCK)[None, :]

    wait_for_predecessor(PDL)
    position = positions(position_ptr, row, mask)
    if D > R:
        own = mask & (column < D - R)
        copied = load_at(x_at + column, own, step, PARTIAL, ON_CUDA)  # a plain NaN keeps its bits
    a, b = load_pairs(
        x_at + (D - R), mask, step, PARTIAL=PARTIAL, R=R, R_BLOCK=R_BLOCK, ROWS=BLOCK_H, HALVES=ROPE == "half",
        ON_CUDA=ON_CUDA,
    )  # fmt: skip
    cos = load_angles(cos_ptr, position, stride_cos, mask, R=R, R_BLOCK=R_BLOCK, ANGLE_UNIT=ANGLE_UNIT)
    sin = load_angles(sin_ptr, position, stride_sin, mask, R=R, R_BLOCK=R_BLOCK, ANGLE_UNIT=ANGLE_UNIT)
    release_dependents(PDL)

    if D > R:
        tl.store(out_at + column, copied.to(DTYPE), mask=own)
    u, v = rotate(a, b, cos, sin, SPEC, DTYPE)
    store_pairs(out_at + (D - R), u, v, mask, R=R, R_BLOCK=R_BLOCK, ROWS=BLOCK_H, HALVES=ROPE != "interleaved")


def heads_of_program(d: int, values: int = VALUES) -> int:
    """Heads of d values that a program takes, a power of two: as many as come to at most `values`, or one."""
    return power_of_two_in(max(1, values // d))


def plan_rope_last(
    x: torch.Tensor | PartialRows,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    heads: int,
    r: int,
    rope: str,
    spec: QuantSpec,
) -> Plan:
    """The launch of `rope_last` on checked inputs like these."""
    m, d = x.shape[0], x.shape[1] // heads
    where = target(x.device)
    unit, angle_unit = stride_unit(x), stride_unit(cos, sin)
    block = heads_of_program(d, PARTIAL_VALUES if isinstance(x, PartialRows) else VALUES)
    return plan(
        rope_last_kernel,
        grid=(-(-m * heads // block), 1, 1),
        inputs=(x, cos, sin, positions),
        outputs=(matrix(m, x.shape[1], x.dtype),),
        numbers=(m, x.stride(0) // unit, cos.stride(0) // angle_unit, sin.stride(0) // angle_unit),
        where=where,
        config=CONFIG,
        H=heads,
        D=d,
        R=r,
        ROPE=rope,
        SPEC=kernel_spec(spec),
        PARTIAL=partial(x),
        BLOCK_H=block,
        COPY_BLOCK=power_of_two(max(1, d - r)),
        R_BLOCK=power_of_two(r // 2),
        STRIDE_UNIT=unit,
        ANGLE_UNIT=angle_unit,
        PDL=where.release(CONFIG),
        ON_CUDA=where.on_cuda,
    )


def rope_last(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    heads: int,
    r: int,
    rope: str,
    spec: QuantSpec,
) -> torch.Tensor:
    """Launch on checked inputs: x [M, H * D] -> the same with the last r values of each head rotated."""
    inputs = x, cos, sin, positions
    (out,) = launch(plan_rope_last(*inputs, heads, r, rope, spec), *inputs)
    return out
