"""What the kernels share on the device: the order of the sum of squares, the roundings, the quantization, the stores.

Every function takes the QuantSpec itself as a compile-time constant and follows `normquant.reference` line by line.
"""

import triton
import triton.language as tl

FP8_MAX = tl.constexpr(448.0)


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
def sum_pairs(s, N: tl.constexpr, LEVELS: tl.constexpr):
    # LEVELS levels of a binary tree over neighbours. A sum of two values has one result whatever lanes hold them.
    for level in tl.static_range(LEVELS):
        s = tl.sum(tl.reshape(s, (N >> (level + 1), 2)), axis=1)
    return s


@triton.jit
def sum_of_squares(h, GROUPS: tl.constexpr, GROUP: tl.constexpr, LOG_GROUPS: tl.constexpr, LOG_GROUP: tl.constexpr):
    # h [GROUPS, GROUP] fp32 -> the scalar sum, in the order of reference.sum_of_squares.
    s = sum_pairs(tl.reshape(h * h, (GROUPS * GROUP,)), GROUPS * GROUP, LOG_GROUP)  # [GROUPS]
    # A gather over its own axis brings all group sums into each warp: one exchange instead of one for each level.
    s = tl.gather(s, tl.arange(0, GROUPS), axis=0)
    return tl.sum(sum_pairs(s, GROUPS, LOG_GROUPS), axis=0)


@triton.jit
def scale_by_weight(n, w, SPEC: tl.constexpr, DTYPE: tl.constexpr):
    # n, w fp32 of one shape -> fp32, rounded to the activation dtype where SPEC.rounding says.
    if SPEC.rounding == "inner" or SPEC.rounding == "twice":
        n = n.to(DTYPE).to(tl.float32)
    y = n * w
    if SPEC.rounding == "once" or SPEC.rounding == "twice":
        y = y.to(DTYPE).to(tl.float32)
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
        s = tl.div_rn(amax, FP8_MAX)
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
    if SPEC.divide == "amax":
        q = y * tl.div_rn(FP8_MAX, amax)[:, None]
    elif SPEC.divide == "reciprocal":
        q = y * tl.div_rn(1.0, s)[:, None]
    elif SPEC.scale != "fp32":
        q = y * tl.div_rn(1.0, s)[:, None]  # exact: the reciprocal of a power of two is one
    else:
        # y / s correctly rounded: a product with the rounded reciprocal, then one step of Newton's method on the
        # residual (Markstein 1990). The signs are placed so that -0 stays -0 (a unary minus would be 0 - x, which loses
        # it); for an inf scale the residual leaves out inf * 0, which is NaN.
        r = tl.div_rn(1.0, s)
        finite = tl.where(s < float("inf"), s, 0.0)
        q = y * r[:, None]
        q = tl.fma((r * -1.0)[:, None], tl.fma(q, finite[:, None], y * -1.0), q)
    # max before min drops NaN on hardware, so it is the saturating cast that clamps; NaN stays NaN.
    return q.to(tl.float8e4nv), s


@triton.jit
def store_scale(
    scale_ptr, s, row, first_group, groups_end, m, scale_rows, K: tl.constexpr, SPEC: tl.constexpr, G: tl.constexpr
):
    # s [G] fp32: the scales of groups first_group .. first_group + G of one row; groups_end of them exist in the row.
    group = first_group + tl.arange(0, G)
    if SPEC.scale == "ue8m0_packed":
        exponent = tl.where(group < groups_end, (s.to(tl.int32, bitcast=True) >> 23) & 0xFF, 0)
        shifted = tl.reshape(exponent, (G // 4, 4)) << (8 * tl.arange(0, 4))[None, :]
        value = tl.sum(shifted, axis=1)  # [G/4] int32, four exponents each
        column = first_group // 4 + tl.arange(0, G // 4)
        mask = column < (K // SPEC.group + 3) // 4
    else:
        value = s
        column = group
        mask = column < groups_end
    if SPEC.layout == "row":
        tl.store(scale_ptr + row * (K // SPEC.group) + column, value, mask=mask)
    else:
        at = scale_ptr + column.to(tl.int64) * scale_rows + row
        tl.store(at, value, mask=mask)
        if SPEC.layout == "col_tma":
            for pad in tl.static_range(1, 4):  # the last row zeroes the at most three rows of padding below it
                tl.store(at + pad, tl.zeros_like(value), mask=mask & (row == m - 1) & (row + pad < scale_rows))
