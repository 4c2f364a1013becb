"""What the kernels share on the device: dependent launch, the roundings, the quantization, the stores.

Every function takes the QuantSpec as a compile-time constant, a `launch.KernelSpec`, and follows `normquant.reference`
line by line.
"""

import triton
import triton.language as tl

from normquant import spec

FP8_MAX = tl.constexpr(spec.FP8_MAX)
AMAX_SHIFT = tl.constexpr(spec.AMAX_SHIFT)
MAX_POWER = tl.constexpr(spec.MAX_POWER)
# 1/448 as a sum of two fp32, the first rounded down: with them amax / 448 comes out correctly rounded for every amax.
INV_FP8_MAX_HI = tl.constexpr(float.fromhex("0x1.249248p-9"))
INV_FP8_MAX_LO = tl.constexpr(float.fromhex("0x1.24924ap-33"))
BELOW_ONE = tl.constexpr(1.0 - 2.0**-21)  # further below one than the error of the hardware's reciprocal


@triton.jit
def wait_for_predecessor(PDL: tl.constexpr):
    # Programmatic dependent launch: nothing that an earlier kernel may have written is read above this line. PDL says
    # when the next kernel may be scheduled, as `launch.RELEASES` has it, or "" where it comes when this one is over.
    if PDL == "start":
        tl.extra.cuda.gdc_launch_dependents()
    if PDL != "":
        tl.extra.cuda.gdc_wait()
    if PDL == "waited":
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def release_dependents(PDL: tl.constexpr):
    # The next kernel may be scheduled; what it reads of ours it reads after its own wait.
    if PDL == "loaded":
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
def reciprocal_approximate(s):
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [s], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def reciprocal(s, ON_CUDA: tl.constexpr):
    # 1/s for s >= 2**-64 as hi + lo, hi below 1/s and lo >= 0: from any approximate reciprocal, one residual gives
    # twice its bits. For an inf scale the residual leaves out inf * 0, which is NaN.
    approximate = reciprocal_approximate(s) if ON_CUDA else 1.0 / s
    hi = approximate * BELOW_ONE
    finite = tl.where(s < float("inf"), s, 0.0)
    return hi, hi * tl.fma(finite * -1.0, hi, 1.0)


@triton.jit
def fp8_max_over(amax, ON_CUDA: tl.constexpr):
    # 448 / amax as IEEE division rounds it, for every amax: a quotient, corrected by its exact remainder (Markstein).
    # For an inf the remainder leaves out inf * 0, as above.
    a = amax * AMAX_SHIFT
    hi, lo = reciprocal(a, ON_CUDA)
    inverse = hi + lo
    quotient = inverse * (FP8_MAX * AMAX_SHIFT)
    finite = tl.where(a < float("inf"), a, 0.0)
    remainder = tl.fma(finite * -1.0, quotient, FP8_MAX * AMAX_SHIFT)
    return tl.fma(remainder, inverse, quotient)


@triton.jit
def times(y, hi, lo):
    # y * (hi + lo), rounded once. Neither term is negative zero for y = +0, nor positive for y = -0: the sign stays.
    return tl.fma(y, hi, y * lo)


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
def group_amax(y, SPEC: tl.constexpr):
    # y [G, group] fp32 -> [G] fp32. A plain maximum prefers numbers to NaN: only a group without any gives NaN.
    if SPEC.nan == "propagate":
        amax = tl.reduce(tl.abs(y), 1, max_or_nan)
    else:
        amax = tl.max(tl.abs(y), axis=1)
    return at_least(amax, SPEC.floor, SPEC)


@triton.jit
def at_least(x, FLOOR: tl.constexpr, SPEC: tl.constexpr):
    if FLOOR > 0.0:
        if SPEC.nan == "propagate":
            x = max_or_nan(x, FLOOR)
        else:
            x = tl.maximum(x, FLOOR)
    return x


@triton.jit
def group_scale(amax, SPEC: tl.constexpr, ON_CUDA: tl.constexpr):
    if SPEC.scale_by == "scalar":
        s = divide_by_constant(amax, FP8_MAX, ON_CUDA)
    elif SPEC.scale_by == "multiply":
        s = amax * (1.0 / FP8_MAX)
    else:
        s = times(amax, INV_FP8_MAX_HI, INV_FP8_MAX_LO)
    s = at_least(s, SPEC.scale_floor, SPEC)
    if SPEC.scale != "fp32":
        up = ((s.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
        if SPEC.nan == "propagate":
            up = tl.where(s < float("inf"), up, s)  # for NaN; inf stays as it is
        s = up
    return s


@triton.jit
def quantize(y, SPEC: tl.constexpr, ON_CUDA: tl.constexpr):
    # y [G, group] fp32 -> q [G, group] fp8, s [G] fp32
    if SPEC.divide == "fast_factor":
        q, s = quantize_by_factor(y, ON_CUDA)
    else:
        q, s = quantize_by_scale(y, SPEC, ON_CUDA)
    # The cast saturates, and NaN stays NaN; a clamp before it would drop NaN on the hardware.
    return q.to(tl.float8e4nv), s


@triton.jit
def quantize_by_factor(y, ON_CUDA: tl.constexpr):
    # As `reference._quantize_by_factor`: fp32 values to be cast, and scales. A NaN is left out of the maximum.
    amax = tl.max(tl.where(y == y, tl.abs(y), 0.0), axis=1)
    if ON_CUDA:
        f = reciprocal_approximate(amax) * FP8_MAX
        s = reciprocal_approximate(f)
    else:
        f = 1.0 / amax * FP8_MAX
        s = 1.0 / f
    f = tl.where(amax == 0.0, 1.0, f)[:, None]
    if ON_CUDA:
        q = tl.inline_asm_elementwise(
            "mul.ftz.f32 $0, $1, $2;", "=f,f,f", [y, f], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        q = y * f
    return q, tl.where(amax == 0.0, 1.0, s)


@triton.jit
def quantize_by_scale(y, SPEC: tl.constexpr, ON_CUDA: tl.constexpr):
    # y [G, group] fp32 -> fp32 values to be cast, and scales [G] fp32.
    amax = group_amax(y, SPEC)
    s = group_scale(amax, SPEC, ON_CUDA)
    # The quotients are those of IEEE division to the bit: tests go through every pair of bf16 and of fp16 mantissas.
    if SPEC.divide == "fast_amax" and ON_CUDA:
        hi = reciprocal_approximate(amax * AMAX_SHIFT)
        lo = 0.0
    else:
        hi, lo = reciprocal(amax * AMAX_SHIFT if SPEC.divide == "amax" or SPEC.divide == "fast_amax" else s, ON_CUDA)
    if SPEC.divide == "amax" or SPEC.divide == "fast_amax":
        q = y * ((hi + lo) * (FP8_MAX * AMAX_SHIFT))[:, None]
    elif SPEC.divide == "factor":
        q = y * fp8_max_over(amax, ON_CUDA)[:, None]
    elif SPEC.divide == "reciprocal" or SPEC.scale != "fp32":  # the reciprocal of a power of two is exact
        q = y * (hi + lo)[:, None]
    else:
        q = times(y, hi[:, None], lo[:, None])
    if SPEC.scale != "fp32" and SPEC.nan == "propagate":
        s = tl.minimum(s, MAX_POWER)  # which prefers a number to NaN, too
    return q, s


@triton.jit
def scale_values(s, mask, SPEC: tl.constexpr, G: tl.constexpr):
    # s [G] fp32, mask [G]: which groups the row has -> what is stored: s, or [G/4] int32 of four exponents each.
    if SPEC.scale == "ue8m0_packed":
        exponent = tl.where(mask, (s.to(tl.int32, bitcast=True) >> 23) & 0xFF, 0)
        value = tl.sum(tl.reshape(exponent, (G // 4, 4)) << (8 * tl.arange(0, 4))[None, :], axis=1)
    else:
        value = s
    return value


@triton.jit
def store_scale(
    scale_ptr, value, row, column, mask, may_be_last, m, scale_rows,
    COLUMNS: tl.constexpr, SPEC: tl.constexpr, ON_CUDA: tl.constexpr,
):  # fmt: skip
    # value, column, mask [N]: what scale_values gives, of one row or each of its own. may_be_last: it may be row m-1.
    if SPEC.layout == "row":
        store_in_place(scale_ptr + row.to(tl.int64) * COLUMNS + column, value, mask, ON_CUDA)
    else:
        at = scale_ptr + column.to(tl.int64) * scale_rows + row
        store_in_place(at, value, mask, ON_CUDA)
        if SPEC.layout == "col_tma":
            if may_be_last:  # the last row zeroes the at most three rows of padding below it
                for pad in tl.static_range(1, 4):
                    padding = (row == m - 1) & (row + pad < (m + 3) // 4 * 4)
                    tl.store(at + pad, tl.zeros_like(value), mask=mask & padding)


@triton.jit
def store_in_place(at, value, mask, ON_CUDA: tl.constexpr):
    # Stores 32-bit values from the threads that have them. All threads of a group have its scale and store it to one
    # place, which is one write. tl.store first moves values to one thread each, which takes two barriers.
    if ON_CUDA:
        tl.inline_asm_elementwise(
            "{ .reg .pred mask; setp.ne.s32 mask, $3, 0; @mask st.global.b32 [$1], $2; mov.b32 $0, 0; }",
            "=r,l,r,r",
            [at.to(tl.int64), value.to(tl.int32, bitcast=True), mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.store(at, value, mask=mask)


@triton.jit
def rows_and_columns(first, N: tl.constexpr, COLUMNS: tl.constexpr):
    # Row and column, [N] each, of N neighbours from `first` on in a matrix whose elements are numbered row by row.
    index = first + tl.arange(0, N)
    return index // COLUMNS, index % COLUMNS


@triton.jit
def own_groups(m, K: tl.constexpr, SPEC: tl.constexpr, BLOCK_G: tl.constexpr):
    # This program's groups, of one row or several: row [G, 1], column of each value [G, group], mask [G, 1].
    PER: tl.constexpr = SPEC.scales_per_element
    COLUMNS: tl.constexpr = (K // SPEC.group + PER - 1) // PER
    row, group = rows_and_columns(tl.program_id(0) * BLOCK_G, BLOCK_G, COLUMNS * PER)
    column = group[:, None] * SPEC.group + tl.arange(0, SPEC.group)[None, :]
    return row[:, None], column, ((row < m) & (group < K // SPEC.group))[:, None]


@triton.jit
def quantize_groups(
    y, data_ptr, scale_ptr, m, scale_rows,
    K: tl.constexpr, SPEC: tl.constexpr, BLOCK_G: tl.constexpr, ON_CUDA: tl.constexpr,
):  # fmt: skip
    # y [G, group] fp32, the values of own_groups -> both outputs.
    row, column, mask = own_groups(m, K, SPEC, BLOCK_G)
    q, s = quantize(y, SPEC, ON_CUDA)
    tl.store(data_ptr + row.to(tl.int64) * K + column, q, mask=mask)
    PER: tl.constexpr = SPEC.scales_per_element
    COLUMNS: tl.constexpr = (K // SPEC.group + PER - 1) // PER
    N: tl.constexpr = BLOCK_G // PER  # stored scales
    value = scale_values(s, tl.reshape(mask, (BLOCK_G,)), SPEC, BLOCK_G)
    row, column = rows_and_columns(tl.program_id(0) * N, N, COLUMNS)
    may_be_last = (tl.program_id(0) + 1) * N > (m - 1) * COLUMNS
    store_scale(
        scale_ptr, value, row, column, mask=row < m, may_be_last=may_be_last, m=m, scale_rows=scale_rows,
        COLUMNS=COLUMNS, SPEC=SPEC, ON_CUDA=ON_CUDA,
    )  # fmt: skip
