"""What the kernels with a rotary position embedding share on the device; as `normquant.reference.rotate`."""

import triton
import triton.language as tl

from normquant.kernels._device import row_offset
from normquant.kernels.partial_rows import load_at


@triton.jit
def positions(position_ptr, row, mask):
    # row, mask [ROWS, 1]. Without positions row i is at position i.
    position = row.to(tl.int64)
    if position_ptr is not None:
        position = tl.load(position_ptr + row, mask=mask, other=0).to(tl.int64)
    return position


@triton.jit
def load_angles(
    angle_ptr, position, stride, mask, R: tl.constexpr, R_BLOCK: tl.constexpr, ANGLE_UNIT: tl.constexpr
):  # fmt: skip
    # [ROWS, R/2], padded, fp32
    i = tl.arange(0, R_BLOCK)[None, :]
    at = angle_ptr + row_offset(position, stride, ANGLE_UNIT) + i
    return tl.load(at, mask=mask & (i < R // 2), other=0.0).to(tl.float32)


@triton.jit
def load_pairs(
    x_ptr, mask, step, PARTIAL: tl.constexpr, R: tl.constexpr, R_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    HALVES: tl.constexpr, ON_CUDA: tl.constexpr,
):  # fmt: skip
    # x_ptr, mask [ROWS, 1] -> [ROWS, R/2] firsts and seconds of the pairs. Neighbours are loaded together and
    # split in registers: loaded one by one, each would be an access of its own.
    i = tl.arange(0, R_BLOCK)[None, :]
    if HALVES:
        a = load_at(x_ptr + i, mask & (i < R // 2), step, PARTIAL, ON_CUDA)
        b = load_at(x_ptr + R // 2 + i, mask & (i < R // 2), step, PARTIAL, ON_CUDA)
    else:
        j = tl.arange(0, 2 * R_BLOCK)[None, :]
        both = load_at(x_ptr + j, mask & (j < R), step, PARTIAL, ON_CUDA)
        a, b = tl.split(tl.reshape(both, (ROWS, R_BLOCK, 2)))
    return a, b


@triton.jit
def store_pairs(out_ptr, u, v, mask, R: tl.constexpr, R_BLOCK: tl.constexpr, ROWS: tl.constexpr, HALVES: tl.constexpr):
    i = tl.arange(0, R_BLOCK)[None, :]
    if HALVES:
        tl.store(out_ptr + i, u, mask=mask & (i < R // 2))
        tl.store(out_ptr + R // 2 + i, v, mask=mask & (i < R // 2))
    else:
        j = tl.arange(0, 2 * R_BLOCK)[None, :]
        tl.store(out_ptr + j, tl.reshape(tl.join(u, v), (ROWS, 2 * R_BLOCK)), mask=mask & (j < R))


@triton.jit
def rotate(a, b, cos, sin, SPEC: tl.constexpr, DTYPE: tl.constexpr):
    # Pairs (a, b) rotated by their angles, fp32 -> the firsts and the seconds of the pairs, in DTYPE.
    a = a.to(tl.float32)
    b = b.to(tl.float32)
    u = product(a, cos, SPEC, DTYPE) - product(b, sin, SPEC, DTYPE)
    v = product(b, cos, SPEC, DTYPE) + product(a, sin, SPEC, DTYPE)
    return u.to(DTYPE), v.to(DTYPE)


@triton.jit
def product(a, b, SPEC: tl.constexpr, DTYPE: tl.constexpr):
    p = a * b
    if SPEC.rounding == "inner" or SPEC.rounding == "twice":
        p = p.to(DTYPE).to(tl.float32)
    return p
