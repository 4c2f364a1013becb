"""Rows that come as parts, one from each rank: added in rank order, then normed and quantized as any row.

A program takes G groups of one row, a part of it or all of it: tiles of 16-bit values [G, group], or of words of two
such values [G, group/2].
"""

import triton
import triton.language as tl

from normquant.kernels._cluster import sum_of_all
from normquant.kernels._device import divide_by_constant, round_to, row_offset, scale_by_weight
from normquant.kernels._exchange import at_offset, sendable, wait_for_words
from normquant.kernels._rows import prefetch_row, row_tile, sums_of_squares
from normquant.kernels.partial_rows import load_rows, row_dtype


@triton.jit
def word_places(ptr, at, first, K: tl.constexpr, BYTES: tl.constexpr, SPEC: tl.constexpr, G: tl.constexpr):
    # Where the words are of groups `first` to `first` + G of a row of K values of BYTES bytes each, which starts at
    # word `at`: pointers [G, group * BYTES / 4], and which of them there are.
    WORDS: tl.constexpr = SPEC.group * BYTES // 4  # of a group
    group = (first + tl.arange(0, G))[:, None]
    column = group * WORDS + tl.arange(0, WORDS)[None, :]
    return ptr + at + column, tl.broadcast_to(group * SPEC.group < K, (G, WORDS))


@triton.jit
def halves(words, DTYPE: tl.constexpr):
    # words int32 of two values each -> both as fp32
    low = words.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    high = (words >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def words_of(values):
    # values of 16 bits [G, N] -> words int32 [G, N/2]; `halves` takes them apart
    low, high = tl.split(tl.reshape(values.to(tl.int16, bitcast=True), (values.shape[0], values.shape[1] // 2, 2)))
    return (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)


@triton.jit
def add_parts(parts, own, DTYPE: tl.constexpr, RANK: tl.constexpr):
    # parts: tiles of words of all ranks but this one, which has `own` -> their sum in rank order, tile of values, fp32.
    low, high = halves(own if RANK == 0 else parts[0], DTYPE)
    for rank in tl.static_range(1, len(parts) + 1):
        more_low, more_high = halves(own if rank == RANK else parts[rank - (rank > RANK)], DTYPE)
        low += more_low
        high += more_high
    G: tl.constexpr = low.shape[0]
    return tl.reshape(tl.join(low, high), (G, 2 * low.shape[1]))


@triton.jit
def load_values(ptr, row_at, first, K: tl.constexpr, SPEC: tl.constexpr, G: tl.constexpr):
    _, column, mask = row_tile(0, first, 1, K, SPEC, 1, G)
    return tl.load(ptr + row_at + column, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def norm_of_parts(
    parts,  # tiles of words of the other ranks, in rank order
    own,  # the tile of words of this one
    residual,  # [G, group] fp32, or None
    weight,  # [G, group] fp32
    eps,
    mailbox,
    weight_offset: tl.constexpr,
    DTYPE: tl.constexpr,
    K: tl.constexpr,
    SPEC: tl.constexpr,
    G: tl.constexpr,
    CLUSTER: tl.constexpr,
    LOG_WARP: tl.constexpr,
    RANK: tl.constexpr,
    ON_CUDA: tl.constexpr,
):
    # -> the sum in DTYPE and the norm in fp32, [G, group] each, as `_rows.norm_quant_rows` has them
    h = round_to(add_parts(parts, own, DTYPE, RANK), DTYPE, ON_CUDA)
    if residual is not None:
        h += residual
        if SPEC.sum == "rounded":
            h = round_to(h, DTYPE, ON_CUDA)
    s = sums_of_squares(h, 1, G * SPEC.group, LOG_WARP)
    if CLUSTER > 1:
        s = sum_of_all(mailbox, s, CLUSTER)
    rstd = tl.rsqrt(divide_by_constant(s, K, ON_CUDA) + eps)
    if weight_offset != 0.0:
        weight += weight_offset
    return h.to(DTYPE), scale_by_weight(h * rstd, weight, SPEC, DTYPE, ON_CUDA)


@triton.jit
def prefetch_inputs(
    x_ptr, residual_ptr, weight_ptr, row, first, stride_xm, stride_rm,
    K: tl.constexpr, SPEC: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    residual_at = residual_ptr
    if residual_ptr is not None:
        residual_at += row_offset(row, stride_rm, 8)
    x_at = x_ptr + row_offset(row, stride_xm, 8)
    prefetch_row(x_at, residual_at, weight_ptr, first * SPEC.group, G * SPEC.group, K)


@triton.jit
def load_part(x_ptr, row, first, m, stride_xm, K: tl.constexpr, SPEC: tl.constexpr, G: tl.constexpr):
    # Words of a row of x, as they may be sent.
    at, mask = word_places(x_ptr.to(tl.pointer_type(tl.int32)), row_offset(row, stride_xm, 4), first, K, 2, SPEC, G)
    return sendable(tl.load(at, mask=mask & (row < m), other=0))


@triton.jit
def load_own_part(
    x_ptr, row, first, m, stride_xm, PARTIAL: tl.constexpr, K: tl.constexpr, SPEC: tl.constexpr, G: tl.constexpr,
    ON_CUDA: tl.constexpr,
):  # fmt: skip
    # The same of this rank's part, whose rows may lie there as the partial sums of the product that made them.
    if PARTIAL.parts == 0:
        words = load_part(x_ptr, row, first, m, stride_xm, K, SPEC, G)
    else:
        DTYPE: tl.constexpr = row_dtype(PARTIAL, None)
        _, column, mask = row_tile(0, first, 1, K, SPEC, 1, G)
        x = load_rows(x_ptr, row, column, mask & (row < m), m, stride_xm, PARTIAL, 8, ON_CUDA)
        words = sendable(words_of(x.to(DTYPE)))
    return words


@triton.jit
def load_residual(residual_ptr, row, first, stride_rm, K: tl.constexpr, SPEC: tl.constexpr, G: tl.constexpr):
    residual = None
    if residual_ptr is not None:
        residual = load_values(residual_ptr, row_offset(row, stride_rm, 8), first, K, SPEC, G)
    return residual


@triton.jit
def store_sum(sum_ptr, total, row, first, K: tl.constexpr, SPEC: tl.constexpr, G: tl.constexpr):
    _, column, mask = row_tile(0, first, 1, K, SPEC, 1, G)
    tl.store(sum_ptr + row.to(tl.int64) * K + column, total, mask=mask)


@triton.jit
def part_places(
    address, start, index, rank, first, K: tl.constexpr, SPEC: tl.constexpr, G: tl.constexpr, WORLD: tl.constexpr
):
    # Where rank's part of a row lies in a buffer: [rows, ranks, K]
    slot = (index.to(tl.int64) * WORLD + rank) * (K // 2)
    return word_places(at_offset(address, start, tl.int32), slot, first, K, 2, SPEC, G)


@triton.jit
def wait_for_parts(
    addresses, table_ptr, epoch, start, index, row, first,
    K: tl.constexpr, SPEC: tl.constexpr, G: tl.constexpr, RANK: tl.constexpr, WORLD: tl.constexpr,
    ON_CUDA: tl.constexpr,
):  # fmt: skip
    places, masks = (), ()
    for rank in tl.static_range(WORLD):
        if rank != RANK:
            place, mask = part_places(addresses[RANK], start, index, rank, first, K, SPEC, G, WORLD)
            places += (place,)
            masks += (mask,)
    return wait_for_words(places, masks, addresses, table_ptr, epoch, row, 1, (4,), RANK, WORLD, ON_CUDA)
