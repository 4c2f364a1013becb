"""What the norm kernels share on the device: the order of the sum of squares, and the rows from load to store.

It follows `normquant.reference` line by line.
"""

import triton
import triton.language as tl

from normquant.kernels import tiling
from normquant.kernels._cluster import sum_of_all
from normquant.kernels._device import (
    divide_by_constant,
    quantize,
    release_dependents,
    row_offset,
    rows_and_columns,
    scale_by_weight,
    scale_values,
    store_scale,
)
from normquant.kernels.partial_rows import load_rows, row_dtype

log2 = triton.constexpr_function(tiling.log2)
power_of_two = triton.constexpr_function(tiling.power_of_two)


@triton.jit
def prefetch_row(x_ptr, residual_ptr, weight_ptr, first, N: tl.constexpr, K: tl.constexpr):
    # Asks the L2 for N values, a power of two, of a row of K and of the weight, from value `first` on, so that they are
    # in it after the wait. A prefetch reads no value: what a predecessor is still writing is as safe as without it.
    # Each lane asks for 128 bytes, of x, of the residual or of the weight, which has twice the bytes where it is fp32.
    LINES: tl.constexpr = max(N // 64, 1)
    lane = tl.arange(0, 4 * LINES)
    at = first * 2 + lane % LINES * 128
    last = K * 2 - 2
    address = x_ptr.to(tl.int64) + tl.minimum(at, last)
    if residual_ptr is not None:
        address = tl.where(lane // LINES == 1, residual_ptr.to(tl.int64) + tl.minimum(at, last), address)
    if weight_ptr.dtype.element_ty == tl.float32:
        at_weight = tl.minimum(at * 2 + tl.where(lane // LINES == 3, 128, 0), K * 4 - 4)
        address = tl.where(lane // LINES >= 2, weight_ptr.to(tl.int64) + at_weight, address)
    else:
        address = tl.where(lane // LINES == 2, weight_ptr.to(tl.int64) + tl.minimum(at, last), address)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def sum_pairs(s, N: tl.constexpr, LEVELS: tl.constexpr):
    # LEVELS levels of a binary tree over neighbours. A sum of two values has one result whatever lanes hold them.
    for level in tl.static_range(LEVELS):
        s = tl.sum(tl.reshape(s, (N >> (level + 1), 2)), axis=1)
    return s


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
def row_tile(first_row, first, m, K: tl.constexpr, SPEC: tl.constexpr, ROWS: tl.constexpr, G: tl.constexpr):
    # G groups of each of ROWS rows, from group `first` on: row, scalar or [ROWS * G, 1]; column [ROWS * G, group];
    # mask of the same shape as row, or [G, 1].
    if ROWS == 1:
        row = first_row
        group = first + tl.arange(0, G)
        mask = group[:, None] * SPEC.group < K
    else:
        local, group = rows_and_columns(0, ROWS * G, G)
        row = (first_row + local)[:, None]
        group += first
        mask = (row < m) & (group[:, None] * SPEC.group < K)
    column = group[:, None] * SPEC.group + tl.arange(0, SPEC.group)[None, :]
    return row, column, mask


@triton.jit
def load_sums(
    x_ptr, residual_ptr, first_row, first, m, stride_xm, stride_rm, K: tl.constexpr, SPEC: tl.constexpr,
    PARTIAL: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, STRIDE_UNIT: tl.constexpr,
    EVICT_FIRST: tl.constexpr, ON_CUDA: tl.constexpr,
):  # fmt: skip
    # x + residual of TILES[0], TILES[1], ... groups, from group `first` on -> a tile for each, fp32.
    EVICTION: tl.constexpr = "evict_first" if EVICT_FIRST else ""
    tiles = ()
    for i in tl.static_range(len(TILES)):
        row, column, mask = row_tile(first_row, first, m, K, SPEC, ROWS, TILES[i])
        h = load_rows(x_ptr, row, column, mask, m, stride_xm, PARTIAL, STRIDE_UNIT, ON_CUDA, EVICT_FIRST)
        if residual_ptr is not None:
            at = residual_ptr + row_offset(row, stride_rm, STRIDE_UNIT) + column
            h += tl.load(at, mask=mask, other=0.0, eviction_policy=EVICTION).to(tl.float32)
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
    x_ptr,  # [M, K] bf16 or fp16, any row stride, or partial sums of such rows
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
    mailbox,  # of this program, where CLUSTER programs share a row and exchange sums
    weight_offset: tl.constexpr,
    K: tl.constexpr,
    SPEC: tl.constexpr,
    PARTIAL: tl.constexpr,  # whether and how the rows of x are partial sums
    ROWS: tl.constexpr,  # more than one only where OWN is all of a row
    CLUSTER: tl.constexpr,  # programs that exchange sums, or 1
    TILES: tl.constexpr,  # groups of each tile that is read, powers of two, descending; the last may reach over the row
    OWN: tl.constexpr,  # of the tiles that are written: TILES, or where programs read a whole row one that is smaller
    LOG_WARPS: tl.constexpr,  # for each of TILES log2 of the neighbours that one warp holds
    LATE_WEIGHT: tl.constexpr,  # read the weight after the sums of squares, so that it holds no registers before
    EVICT_FIRST: tl.constexpr,  # x and the residual leave the L2 first
    KEEP_SUM: tl.constexpr,  # x + residual leaves it last
    STRIDE_UNIT: tl.constexpr,
    PDL: tl.constexpr,
    ON_CUDA: tl.constexpr,
):
    # Whole rows are read for the sums of squares, and all other loads stand before the first store.
    DTYPE: tl.constexpr = row_dtype(PARTIAL, x_ptr.dtype.element_ty)
    SPLIT: tl.constexpr = OWN[0] < TILES[0]
    first = part * OWN[0] if SPLIT or CLUSTER > 1 else 0
    h_own = load_sums(
        x_ptr, residual_ptr, first_row, first, m=m, stride_xm=stride_xm, stride_rm=stride_rm, K=K, SPEC=SPEC,
        PARTIAL=PARTIAL, ROWS=ROWS, TILES=OWN, STRIDE_UNIT=STRIDE_UNIT, EVICT_FIRST=EVICT_FIRST, ON_CUDA=ON_CUDA,
    )  # fmt: skip
    h = h_own
    if SPLIT:
        h = load_sums(
            x_ptr, residual_ptr, first_row, 0, m=m, stride_xm=stride_xm, stride_rm=stride_rm, K=K, SPEC=SPEC,
            PARTIAL=PARTIAL, ROWS=ROWS, TILES=TILES, STRIDE_UNIT=STRIDE_UNIT, EVICT_FIRST=EVICT_FIRST, ON_CUDA=ON_CUDA,
        )  # fmt: skip
    if not LATE_WEIGHT:
        w = load_weights(weight_ptr, first, K, SPEC, ROWS, OWN)
    release_dependents(PDL)

    if sum_ptr is not None:
        start = first
        for i in tl.static_range(len(OWN)):
            row, column, mask = row_tile(first_row, start, m, K, SPEC, ROWS, OWN[i])
            at = sum_ptr + row.to(tl.int64) * K + column
            tl.store(at, h_own[i].to(DTYPE), mask=mask, eviction_policy="evict_last" if KEEP_SUM else "")
            start += OWN[i]
        if SPEC.sum == "rounded":
            h = rounded(h, DTYPE)
            h_own = rounded(h_own, DTYPE)
    # The tree over a row that is padded to a power of two: what a tile lacks there are zeros, which add nothing.
    LAST: tl.constexpr = len(TILES) - 1
    s = sums_of_squares(h[LAST], ROWS, TILES[LAST] * SPEC.group, LOG_WARPS[LAST])
    for i in tl.static_range(1, len(TILES)):
        s = sums_of_squares(h[LAST - i], ROWS, TILES[LAST - i] * SPEC.group, LOG_WARPS[LAST - i]) + s
    if CLUSTER > 1:
        s = sum_of_all(mailbox, s, CLUSTER)
    rstd = tl.rsqrt(divide_by_constant(s, K, ON_CUDA) + eps)  # scalar, or [ROWS]
    if LATE_WEIGHT:
        w = load_weights(weight_ptr, first, K, SPEC, ROWS, OWN)
    for i in tl.static_range(len(OWN)):
        w_own = w[i]
        if weight_offset != 0.0:
            w_own += weight_offset
        y = scale_by_weight(h_own[i] * each_group(rstd, ROWS, OWN[i]), w_own, SPEC, DTYPE, ON_CUDA)
        store_tile(
            y, data_ptr, scale_ptr, norm_ptr, first_row, first, m=m, scale_rows=scale_rows, K=K, SPEC=SPEC, ROWS=ROWS,
            G=OWN[i], ON_CUDA=ON_CUDA,
        )  # fmt: skip
        first += OWN[i]


@triton.jit
def store_tile(
    y, data_ptr, scale_ptr, norm_ptr, first_row, first, m, scale_rows,
    K: tl.constexpr, SPEC: tl.constexpr, ROWS: tl.constexpr, G: tl.constexpr, ON_CUDA: tl.constexpr,
):  # fmt: skip
    # y [ROWS * G, group] fp32, a row_tile of the norm -> the norm, its quantized values and their scales, as asked for.
    row, column, mask = row_tile(first_row, first, m, K, SPEC, ROWS, G)
    out = row.to(tl.int64) * K + column
    if norm_ptr is not None:
        tl.store(norm_ptr + out, y.to(norm_ptr.dtype.element_ty), mask=mask)
    if data_ptr is not None:
        q, s = quantize(y, SPEC, ON_CUDA)
        tl.store(data_ptr + out, q, mask=mask)
        PER: tl.constexpr = SPEC.scales_per_element
        COLUMNS: tl.constexpr = (K // SPEC.group + PER - 1) // PER
        value = scale_values(s, tl.reshape(mask, (ROWS * G,)), SPEC, ROWS * G)
        at_column = first // PER
        if ROWS == 1:
            at_row = first_row
            at_column += tl.arange(0, G // PER)
            scale_mask = at_column < COLUMNS
        else:
            local, column = rows_and_columns(0, ROWS * G // PER, G // PER)
            at_row = first_row + local
            at_column += column
            scale_mask = (at_row < m) & (at_column < COLUMNS)
        may_be_last = first_row + ROWS >= m
        store_scale(
            scale_ptr, value, at_row, at_column, mask=scale_mask, may_be_last=may_be_last, m=m, scale_rows=scale_rows,
            COLUMNS=COLUMNS, SPEC=SPEC, ON_CUDA=ON_CUDA,
        )  # fmt: skip


@triton.jit
def each_group(rstd, ROWS: tl.constexpr, G: tl.constexpr):
    # [ROWS] -> [ROWS * G, 1]; a scalar stays one
    if ROWS > 1:
        rstd = tl.reshape(tl.broadcast_to(rstd[:, None], (ROWS, G)), (ROWS * G, 1))
    return rstd
