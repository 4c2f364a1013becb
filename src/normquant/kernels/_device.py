"""What the kernels share on the device: the order of the sum of squares, the roundings, the quantization, the stores.

Every function takes the QuantSpec as a compile-time constant, a `launch.Constant`, and follows `normquant.reference`
line by line.
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


@triton.constexpr_function
def power_of_two(n):
    return 1 << (n - 1).bit_length()


@triton.jit
def prefetch_row(x_ptr, residual_ptr, weight_ptr, K: tl.constexpr):
    # Asks the L2 for a row of K values and the weight, so that they are there after the wait. A prefetch reads no
    # value: what a predecessor is still writing is as safe as without it. Each lane asks for 128 bytes, of x, of the
    # residual or of the weight, which has a second half of as many bytes where it is fp32.
    LINES: tl.constexpr = power_of_two(K) // 64
    lane = tl.arange(0, 4 * LINES)
    at = tl.minimum(lane % LINES * 128, K * 2 - 2)
    address = x_ptr.to(tl.int64) + at
    if residual_ptr is not None:
        address = tl.where(lane // LINES == 1, residual_ptr.to(tl.int64) + at, address)
    address = tl.where(lane // LINES == 2, weight_ptr.to(tl.int64) + at, address)
    if weight_ptr.dtype.element_ty == tl.float32:
        address = tl.where(lane // LINES == 3, weight_ptr.to(tl.int64) + K * 2 + at, address)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )


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
def times(y, hi, lo):
    # y * (hi + lo), rounded once. Neither term is negative zero for y = +0, nor positive for y = -0: the sign stays.
    return tl.fma(y, hi, y * lo)


@triton.jit
def sum_pairs(s, N: tl.constexpr, LEVELS: tl.constexpr):
    # LEVELS levels of a binary tree over neighbours. A sum of two values has one result whatever lanes hold them.
    for level in tl.static_range(LEVELS):
        s = tl.sum(tl.reshape(s, (N >> (level + 1), 2)), axis=1)
    return s


@triton.constexpr_function
def log2(n):
    return n.bit_length() - 1


@triton.jit
def sums_of_squares(h, ROWS: tl.constexpr, N: tl.constexpr, LOG_WARP: tl.constexpr):
    # h, ROWS rows of N values, a power of two, fp32 -> [ROWS], or a scalar of one row, in the order of
    # reference.sum_of_squares.
    # 2**LOG_WARP neighbours lie in one warp, whose levels of the tree need no exchange. A gather over its own axis then
    # brings what is left into every warp at once: one exchange instead of one for each level that is still to come.
    LEFT: tl.constexpr = ROWS * N >> LOG_WARP
    s = sum_pairs(tl.reshape(h * h, (ROWS * N,)), ROWS * N, LOG_WARP)  # [LEFT]
    if LOG_WARP < log2(N):
        s = tl.gather(s, tl.arange(0, LEFT), axis=0)
        s = sum_pairs(s, LEFT, log2(N) - LOG_WARP)
    if ROWS == 1:
        s = tl.sum(s, axis=0)
    return s


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
    if SPEC.divide == "fast_amax" and ON_CUDA:
        hi = reciprocal_approximate(amax * AMAX_SHIFT)
        lo = 0.0
    else:
        hi, lo = reciprocal(amax * AMAX_SHIFT if SPEC.divide == "amax" or SPEC.divide == "fast_amax" else s, ON_CUDA)
    if SPEC.divide == "amax" or SPEC.divide == "fast_amax":
        q = y * ((hi + lo) * (FP8_MAX * AMAX_SHIFT))[:, None]
    elif SPEC.divide == "reciprocal" or SPEC.scale != "fp32":  # the reciprocal of a power of two is exact
        q = y * (hi + lo)[:, None]
    else:
        q = times(y, hi[:, None], lo[:, None])
    # The cast saturates, and NaN stays NaN; a clamp before it would drop NaN on the hardware.
    return q.to(tl.float8e4nv), s


@triton.jit
def scale_values(s, inside, SPEC: tl.constexpr, G: tl.constexpr):
    # s [G] fp32, inside [G]: the groups that the row has -> what is stored: s, or [G/4] int32 of four exponents each.
    if SPEC.scale == "ue8m0_packed":
        exponent = tl.where(inside, (s.to(tl.int32, bitcast=True) >> 23) & 0xFF, 0)
        value = tl.sum(tl.reshape(exponent, (G // 4, 4)) << (8 * tl.arange(0, 4))[None, :], axis=1)
    else:
        value = s
    return value


@triton.jit
def store_scale(
    scale_ptr, value, row, column, mask, may_be_last, m, scale_rows, COLUMNS: tl.constexpr, SPEC: tl.constexpr
):
    # value, column, mask [N]: what scale_values gives, of one row or each of its own. may_be_last: row m - 1 is there.
    if SPEC.layout == "row":
        tl.store(scale_ptr + row.to(tl.int64) * COLUMNS + column, value, mask=mask)
    else:
        at = scale_ptr + column.to(tl.int64) * scale_rows + row
        tl.store(at, value, mask=mask)
        if SPEC.layout == "col_tma":
            if may_be_last:  # the last row zeroes the at most three rows of padding below it
                for pad in tl.static_range(1, 4):
                    tl.store(at + pad, tl.zeros_like(value), mask=mask & (row == m - 1) & (row + pad < scale_rows))


@triton.jit
def rows_and_columns(first, N: tl.constexpr, COLUMNS: tl.constexpr):
    # Row and column, [N] each, of N neighbours from `first` on in a matrix whose elements are numbered row by row.
    index = first + tl.arange(0, N)
    return index // COLUMNS, index % COLUMNS


@triton.jit
def own_groups(m, K: tl.constexpr, SPEC: tl.constexpr, BLOCK_G: tl.constexpr):
    # This program's groups, of one row or several: row [G, 1], column of each value [G, group], which there are [G, 1].
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
    row, column, there = own_groups(m, K, SPEC, BLOCK_G)
    q, s = quantize(y, SPEC, ON_CUDA)
    tl.store(data_ptr + row.to(tl.int64) * K + column, q, mask=there)
    PER: tl.constexpr = SPEC.scales_per_element
    COLUMNS: tl.constexpr = (K // SPEC.group + PER - 1) // PER
    N: tl.constexpr = BLOCK_G // PER  # stored scales
    value = scale_values(s, tl.reshape(there, (BLOCK_G,)), SPEC, BLOCK_G)
    row, column = rows_and_columns(tl.program_id(0) * N, N, COLUMNS)
    may_be_last = (tl.program_id(0) + 1) * N > (m - 1) * COLUMNS
    store_scale(scale_ptr, value, row, column, row < m, may_be_last, m, scale_rows, COLUMNS, SPEC)


@triton.jit
def row_tile(first_row, first, m, K: tl.constexpr, SPEC: tl.constexpr, ROWS: tl.constexpr, G: tl.constexpr):
    # G groups of each of ROWS rows, from group `first` on: row, scalar or [ROWS * G, 1]; column [ROWS * G, group];
    # which of them there are.
    if ROWS == 1:
        row = first_row
        group = first + tl.arange(0, G)
        inside = group[:, None] * SPEC.group < K
    else:
        local, group = rows_and_columns(0, ROWS * G, G)
        row = (first_row + local)[:, None]
        group += first
        inside = (row < m) & (group[:, None] * SPEC.group < K)
    column = group[:, None] * SPEC.group + tl.arange(0, SPEC.group)[None, :]
    return row, column, inside


@triton.jit
def load_sums(
    x_ptr, residual_ptr, first_row, first, m, stride_xm, stride_rm, K: tl.constexpr, SPEC: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, STRIDE_UNIT: tl.constexpr, EVICT_FIRST: tl.constexpr,
):  # fmt: skip
    # x + residual of TILES[0], TILES[1], ... groups, from group `first` on -> a tile for each, fp32.
    EVICTION: tl.constexpr = "evict_first" if EVICT_FIRST else ""
    tiles = ()
    for i in tl.static_range(len(TILES)):
        row, column, inside = row_tile(first_row, first, m, K, SPEC, ROWS, TILES[i])
        at = x_ptr + row_offset(row, stride_xm, STRIDE_UNIT) + column
        h = tl.load(at, mask=inside, other=0.0, eviction_policy=EVICTION).to(tl.float32)
        if residual_ptr is not None:
            at = residual_ptr + row_offset(row, stride_rm, STRIDE_UNIT) + column
            h += tl.load(at, mask=inside, other=0.0, eviction_policy=EVICTION).to(tl.float32)
        tiles += (h,)
        first += TILES[i]
    return tiles


@triton.jit
def load_weights(weight_ptr, first, K: tl.constexpr, SPEC: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr):
    tiles = ()
    for i in tl.static_range(len(TILES)):
        _, column, _ = row_tile(0, first, 1, K, SPEC, ROWS, TILES[i])
        tiles += (tl.load(weight_ptr + column, mask=column < K, other=0.0).to(tl.float32),)
        first += TILES[i]
    return tiles


@triton.jit
def rounded(tiles, DTYPE: tl.constexpr):
    out = ()
    for i in tl.static_range(len(tiles)):
        out += (tiles[i].to(DTYPE).to(tl.float32),)
    return out


@triton.jit
def norm_quant_rows(
    x_ptr,  # [M, K] bf16 or fp16, any row stride
    residual_ptr,  # [M, K] like x, or None
    weight_ptr,  # [K] bf16, fp16 or fp32
    data_ptr,  # [M, K] fp8, or None: no quantization
    scale_ptr,
    sum_ptr,  # [M, K] like x for x + residual, or None
    norm_ptr,  # [M, K] like x for the norm, or None
    stride_xm,
    stride_rm,
    first_row,  # the first of ROWS rows
    part,  # which of the programs of a row this is
    m,
    scale_rows,
    eps,
    weight_offset: tl.constexpr,
    K: tl.constexpr,
    SPEC: tl.constexpr,
    ROWS: tl.constexpr,  # more than one only where OWN is all of a row
    TILES: tl.constexpr,  # groups of each tile of a row, powers of two, descending; the last may reach over its end
    OWN: tl.constexpr,  # of the tiles that are written: TILES, or where programs share a row one that is smaller
    LOG_WARPS: tl.constexpr,  # for each of TILES log2 of the neighbours that one warp holds
    LATE_WEIGHT: tl.constexpr,  # read the weight after the sums of squares, so that it holds no registers before
    EVICT_FIRST: tl.constexpr,  # x and the residual leave the L2 first
    KEEP_SUM: tl.constexpr,  # x + residual leaves it last
    STRIDE_UNIT: tl.constexpr,
    PDL: tl.constexpr,
    ON_CUDA: tl.constexpr,
):
    # Whole rows are read for the sums of squares, and all other loads stand before the first store.
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    SPLIT: tl.constexpr = OWN[0] < TILES[0]
    first = part * OWN[0] if SPLIT else 0
    h_own = load_sums(
        x_ptr, residual_ptr, first_row, first, m, stride_xm, stride_rm, K, SPEC, ROWS, OWN, STRIDE_UNIT, EVICT_FIRST
    )
    h = h_own
    if SPLIT:
        h = load_sums(
            x_ptr, residual_ptr, first_row, 0, m, stride_xm, stride_rm, K, SPEC, ROWS, TILES, STRIDE_UNIT, EVICT_FIRST
        )
    if not LATE_WEIGHT:
        w = load_weights(weight_ptr, first, K, SPEC, ROWS, OWN)
    release_dependents(PDL)

    if sum_ptr is not None:
        start = first
        for i in tl.static_range(len(OWN)):
            row, column, inside = row_tile(first_row, start, m, K, SPEC, ROWS, OWN[i])
            at = sum_ptr + row.to(tl.int64) * K + column
            tl.store(at, h_own[i].to(DTYPE), mask=inside, eviction_policy="evict_last" if KEEP_SUM else "")
            start += OWN[i]
        if SPEC.sum == "rounded":
            h = rounded(h, DTYPE)
            h_own = rounded(h_own, DTYPE)
    # The tree over a row that is padded to a power of two: what a tile lacks there are zeros, which add nothing.
    LAST: tl.constexpr = len(TILES) - 1
    s = sums_of_squares(h[LAST], ROWS, TILES[LAST] * SPEC.group, LOG_WARPS[LAST])
    for i in tl.static_range(1, len(TILES)):
        s = sums_of_squares(h[LAST - i], ROWS, TILES[LAST - i] * SPEC.group, LOG_WARPS[LAST - i]) + s
    rstd = tl.rsqrt(divide_by_constant(s, K, ON_CUDA) + eps)  # scalar, or [ROWS]
    if LATE_WEIGHT:
        w = load_weights(weight_ptr, first, K, SPEC, ROWS, OWN)
    for i in tl.static_range(len(OWN)):
        w_own = w[i]
        if weight_offset != 0.0:
            w_own += weight_offset
        y = scale_by_weight(h_own[i] * each_group(rstd, ROWS, OWN[i]), w_own, SPEC, DTYPE, ON_CUDA)
        store_tile(y, data_ptr, scale_ptr, norm_ptr, first_row, first, m, scale_rows, K, SPEC, ROWS, OWN[i], ON_CUDA)
        first += OWN[i]


@triton.jit
def store_tile(
    y, data_ptr, scale_ptr, norm_ptr, first_row, first, m, scale_rows,
    K: tl.constexpr, SPEC: tl.constexpr, ROWS: tl.constexpr, G: tl.constexpr, ON_CUDA: tl.constexpr,
):  # fmt: skip
    # y [ROWS * G, group] fp32, a row_tile of the norm -> the norm, its quantized values and their scales, as asked for.
    row, column, inside = row_tile(first_row, first, m, K, SPEC, ROWS, G)
    out = row.to(tl.int64) * K + column
    if norm_ptr is not None:
        tl.store(norm_ptr + out, y.to(norm_ptr.dtype.element_ty), mask=inside)
    if data_ptr is not None:
        q, s = quantize(y, SPEC, ON_CUDA)
        tl.store(data_ptr + out, q, mask=inside)
        PER: tl.constexpr = SPEC.scales_per_element
        COLUMNS: tl.constexpr = (K // SPEC.group + PER - 1) // PER
        value = scale_values(s, tl.reshape(inside, (ROWS * G,)), SPEC, ROWS * G)
        at_column = first // PER
        if ROWS == 1:
            at_row = first_row
            at_column += tl.arange(0, G // PER)
            there = at_column < COLUMNS
        else:
            local, column = rows_and_columns(0, ROWS * G // PER, G // PER)
            at_row = first_row + local
            at_column += column
            there = (at_row < m) & (at_column < COLUMNS)
        may_be_last = first_row + ROWS >= m
        store_scale(scale_ptr, value, at_row, at_column, there, may_be_last, m, scale_rows, COLUMNS, SPEC)


@triton.jit
def each_group(rstd, ROWS: tl.constexpr, G: tl.constexpr):
    # [ROWS] -> [ROWS * G, 1]; a scalar stays one
    if ROWS > 1:
        rstd = tl.reshape(tl.broadcast_to(rstd[:, None], (ROWS, G)), (ROWS * G, 1))
    return rstd
