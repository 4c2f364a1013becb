"""What the kernels share on the device: the order of the sum of squares, the roundings, the quantization, the stores.

Every function takes the QuantSpec itself as a compile-time constant and follows `normquant.reference` line by line.
"""

import triton
import triton.language as tl

from normquant import spec

FP8_MAX = tl.constexpr(spec.FP8_MAX)
AMAX_SHIFT = tl.constexpr(spec.AMAX_SHIFT)
# 1/448 as a sum of two fp32, the first rounded down: with them amax / 448 comes out correctly rounded for every amax.
INV_FP8_MAX_HI = tl.constexpr(float.fromhex("0x1.249248p-9"))
INV_FP8_MAX_LO = tl.constexpr(float.fromhex("0x1.24924ap-33"))
BELOW_ONE = tl.constexpr(1.0 - 2.0**-21)  # further below one than the error of the hardware's reciprocal


@triton.jit
def wait_for_predecessor(PDL: tl.constexpr):
    # Programmatic dependent launch: nothing that an earlier kernel may have written is read above this line.
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def release_dependents(PDL: tl.constexpr):
    # The next kernel may be scheduled; what it reads of ours it reads after its own wait.
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def row_offset(row, stride, STRIDE_UNIT: tl.constexpr):
    # The host passes stride / STRIDE_UNIT: the constant factor is what tells the compiler that a row start is aligned.
    return row.to(tl.int64) * stride * STRIDE_UNIT


@triton.jit
def divide_by_constant(x, C: tl.constexpr, ON_CUDA: tl.constexpr):
    # torch divides by a Python scalar with a product by its fp32 reciprocal on CUDA and truly on CPU.
    if ON_CUDA:
        return x * (1.0 / C)
    return tl.div_rn(x, C)


@triton.jit
def reciprocal(s, ON_CUDA: tl.constexpr):
    # 1/s for s >= 2**-64 as hi + lo, hi below 1/s and lo >= 0: from any approximate reciprocal, one residual gives
    # twice its bits. For an inf scale the residual leaves out inf * 0, which is NaN.
    if ON_CUDA:
        approximate = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [s], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        approximate = 1.0 / s
    hi = approximate * BELOW_ONE
    finite = tl.where(s < float("inf"), s, 0.0)
    return hi, hi * tl.fma(finite * -1.0, hi, 1.0)


@triton.jit
def times(y, hi, lo):
    # y * (hi + lo), rounded once. Neither term is negative zero for y = +0, nor positive for y = -0: the sign stays.
    return tl.fma(y, hi, y * lo)


@triton.jit
def sum_pairs(s, N: tl.constexpr, LEVELS: tl.constexpr):
    # LEVELS levels of a binary tree over neighbours. A sum of two values has one result whatever lanes hold them.
    for level in tl.static_range(LEVELS):
        s = tl.sum(tl.reshape(s, (N >> (level + 1), 2)), axis=1)
    return s


@triton.jit
def sum_of_squares(h, N: tl.constexpr, LOG_N: tl.constexpr, LOG_WARP: tl.constexpr):
    # h with N = 2**LOG_N values, fp32 -> the scalar sum, in the order of reference.sum_of_squares.
    # 2**LOG_WARP neighbours lie in one warp, whose levels of the tree need no exchange. A gather over its own axis then
    # brings what is left into every warp at once: one exchange instead of one for each level that is still to come.
    LEFT: tl.constexpr = N >> LOG_WARP
    s = sum_pairs(tl.reshape(h * h, (N,)), N, LOG_WARP)  # [LEFT]
    s = tl.gather(s, tl.arange(0, LEFT), axis=0)
    return tl.sum(sum_pairs(s, LEFT, LOG_N - LOG_WARP), axis=0)


@triton.jit
def round_to(y, DTYPE: tl.constexpr, ON_CUDA: tl.constexpr):
    # fp32 -> DTYPE -> fp32. Two values at a time: one alone goes through the slow conversion unit.
    if ON_CUDA and DTYPE == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; cvt.rn.bf16x2.f32 t, $3, $2; shl.b32 $0, t, 16; and.b32 $1, t, 0xffff0000; }",
            "=f,=f,f,f",
            [y],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    return y.to(DTYPE).to(tl.float32)


@triton.jit
def scale_by_weight(n, w, SPEC: tl.constexpr, DTYPE: tl.constexpr, ON_CUDA: tl.constexpr):
    # n, w fp32 of one shape -> fp32, rounded to the activation dtype where SPEC.rounding says.
    if SPEC.rounding == "inner" or SPEC.rounding == "twice":
        n = round_to(n, DTYPE, ON_CUDA)
    y = n * w
    if SPEC.rounding == "once" or SPEC.rounding == "twice":
        y = round_to(y, DTYPE, ON_CUDA)
    return y


@triton.jit
def max_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def group_scale(amax, SPEC: tl.constexpr, ON_CUDA: tl.constexpr):
    if SPEC.scale_by == "scalar":
        s = divide_by_constant(amax, FP8_MAX, ON_CUDA)
    elif SPEC.scale_by == "multiply":
        s = amax * (1.0 / FP8_MAX)
    else:
        s = times(amax, INV_FP8_MAX_HI, INV_FP8_MAX_LO)
    if SPEC.scale_floor > 0.0:
        s = max_or_nan(s, SPEC.scale_floor)
    if SPEC.scale != "fp32":
        up = ((s.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
        s = tl.where(s < float("inf"), up, s)
    return s


@triton.jit
def quantize(y, SPEC: tl.constexpr, ON_CUDA: tl.constexpr):
    # y [G, group] fp32 -> q [G, group] fp8, s [G] fp32
    amax = tl.reduce(tl.abs(y), 1, max_or_nan)
    if SPEC.floor > 0.0:
        amax = max_or_nan(amax, SPEC.floor)
    s = group_scale(amax, SPEC, ON_CUDA)
    # The quotients are those of IEEE division to the bit: tests go through every pair of bf16 and of fp16 mantissas.
    hi, lo = reciprocal(amax * AMAX_SHIFT if SPEC.divide == "amax" else s, ON_CUDA)
    if SPEC.divide == "amax":
        q = y * ((hi + lo) * (FP8_MAX * AMAX_SHIFT))[:, None]
    elif SPEC.divide == "reciprocal" or SPEC.scale != "fp32":  # the reciprocal of a power of two is exact
        q = y * (hi + lo)[:, None]
    else:
        q = times(y, hi[:, None], lo[:, None])
    # The cast saturates, and NaN stays NaN; a clamp before it would drop NaN on the hardware.
    return q.to(tl.float8e4nv), s


@triton.jit
def store_scale(scale_ptr, s, row, first, m, scale_rows, K: tl.constexpr, SPEC: tl.constexpr, G: tl.constexpr):
    # s [G] fp32: the scales of groups first .. first + G of one row, as far as the row has them.
    GROUPS: tl.constexpr = K // SPEC.group
    group = first + tl.arange(0, G)
    if SPEC.scale == "ue8m0_packed":
        exponent = tl.where(group < GROUPS, (s.to(tl.int32, bitcast=True) >> 23) & 0xFF, 0)
        shifted = tl.reshape(exponent, (G // 4, 4)) << (8 * tl.arange(0, 4))[None, :]
        value = tl.sum(shifted, axis=1)  # [G/4] int32, four exponents each
        column = first // 4 + tl.arange(0, G // 4)
        mask = column < (GROUPS + 3) // 4
    else:
        value = s
        column = group
        mask = column < GROUPS
    if SPEC.layout == "row":
        tl.store(scale_ptr + row.to(tl.int64) * GROUPS + column, value, mask=mask)
    else:
        at = scale_ptr + column.to(tl.int64) * scale_rows + row
        tl.store(at, value, mask=mask)
        if SPEC.layout == "col_tma":
            if row == m - 1:  # the last row zeroes the at most three rows of padding below it
                for pad in tl.static_range(1, 4):
                    tl.store(at + pad, tl.zeros_like(value), mask=mask & (row + pad < scale_rows))


@triton.jit
def load_sum(x_ptr, residual_ptr, at, K: tl.constexpr):
    h = tl.load(x_ptr + at, mask=at < K, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        h += tl.load(residual_ptr + at, mask=at < K, other=0.0).to(tl.float32)
    return h


@triton.jit
def norm_quant_row(
    x_ptr,  # the row's K values, bf16 or fp16
    residual_ptr,  # the same of the residual, or None
    weight_ptr,  # [K] bf16, fp16 or fp32
    data_ptr,  # [M, K] fp8, or None: no quantization
    scale_ptr,
    sum_ptr,  # [M, K] like x for x + residual, or None
    norm_ptr,  # [M, K] like x for the norm, or None
    row,
    first,  # the first of BLOCK_G groups that are written
    m,
    scale_rows,
    eps,
    weight_offset: tl.constexpr,
    K: tl.constexpr,
    SPEC: tl.constexpr,
    GROUPS: tl.constexpr,  # groups of a row, rounded up to a power of two
    LOG_N: tl.constexpr,  # log2 of GROUPS times the group
    LOG_WARP: tl.constexpr,  # log2 of the neighbours that one warp holds
    BLOCK_G: tl.constexpr,
    PDL: tl.constexpr,
    ON_CUDA: tl.constexpr,
):
    # The whole row is read for the sum of squares, and all loads stand before the first store.
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    in_group = tl.arange(0, SPEC.group)[None, :]
    whole = tl.arange(0, GROUPS)[:, None] * SPEC.group + in_group  # [GROUPS, group]
    own = (first + tl.arange(0, BLOCK_G)[:, None]) * SPEC.group + in_group  # [BLOCK_G, group]
    h = load_sum(x_ptr, residual_ptr, whole, K)
    if BLOCK_G == GROUPS:
        h_own = h
    else:
        h_own = load_sum(x_ptr, residual_ptr, own, K)
    w = tl.load(weight_ptr + own, mask=own < K, other=0.0).to(tl.float32)
    release_dependents(PDL)

    out = row.to(tl.int64) * K + own
    if sum_ptr is not None:
        tl.store(sum_ptr + out, h_own.to(DTYPE), mask=own < K)
        if SPEC.sum == "rounded":
            h = h.to(DTYPE).to(tl.float32)
            h_own = h_own.to(DTYPE).to(tl.float32)
    if weight_offset != 0.0:
        w += weight_offset
    mean = divide_by_constant(sum_of_squares(h, GROUPS * SPEC.group, LOG_N, LOG_WARP), K, ON_CUDA)
    y = scale_by_weight(h_own * tl.rsqrt(mean + eps), w, SPEC, DTYPE, ON_CUDA)
    if norm_ptr is not None:
        tl.store(norm_ptr + out, y.to(DTYPE), mask=own < K)
    if data_ptr is not None:
        q, s = quantize(y, SPEC, ON_CUDA)
        tl.store(data_ptr + out, q, mask=own < K)
        store_scale(scale_ptr, s, row, first, m, scale_rows, K, SPEC, BLOCK_G)
