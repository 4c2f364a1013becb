"""Rows that their owner has normed and quantized, on their way to the outputs of all ranks."""

import triton
import triton.language as tl

from normquant.kernels._device import quantize, scale_values, store_scale
from normquant.kernels._exchange import at_offset, sendable_values, wait_for_words
from normquant.kernels._partial_sums import word_places
from normquant.kernels._rows import row_tile


@triton.jit
def result_offsets(rows, K: tl.constexpr, SPEC: tl.constexpr):
    # A rank's room for results: data [rows, K] fp8; scale [rows, K/group] fp32, rows padded to 16 bytes; norm and sum
    # [rows, K] in x's dtype. -> where scale, norm and sum start, in bytes, and the width of scale.
    WIDTH: tl.constexpr = (K // SPEC.group + 3) // 4 * 4
    scale_at = rows.to(tl.int64) * K
    norm_at = scale_at + rows.to(tl.int64) * (4 * WIDTH)
    return scale_at, norm_at, norm_at + rows.to(tl.int64) * (2 * K), WIDTH


@triton.jit
def send_row(
    results, total, y, row, rows, first, DTYPE: tl.constexpr, K: tl.constexpr, SPEC: tl.constexpr, G: tl.constexpr,
    SHARDED: tl.constexpr, QUANTIZED: tl.constexpr, NORMED: tl.constexpr, ON_CUDA: tl.constexpr,
):  # fmt: skip
    # results: the address of a peer's room for them. Scales are sent as fp32, of which none is absent.
    _, column, mask = row_tile(0, first, 1, K, SPEC, 1, G)
    scale_at, norm_at, sum_at, WIDTH = result_offsets(rows, K, SPEC)
    at = row.to(tl.int64) * K + column
    if QUANTIZED:
        q, s = quantize(y, SPEC, ON_CUDA)
        tl.store(at_offset(results, 0, tl.float8e4nv) + at, sendable_values(q, ON_CUDA), mask=mask)
        group = first + tl.arange(0, G)
        scale_place = at_offset(results, scale_at, tl.float32) + row.to(tl.int64) * WIDTH + group
        tl.store(scale_place, s, mask=group * SPEC.group < K)
    if NORMED:
        tl.store(at_offset(results, norm_at, DTYPE) + at, sendable_values(y.to(DTYPE), ON_CUDA), mask=mask)
    if not SHARDED:
        tl.store(at_offset(results, sum_at, DTYPE) + at, sendable_values(total, ON_CUDA), mask=mask)


@triton.jit
def gather_rows(
    addresses, table_ptr, epoch, results, data_ptr, scale_ptr, sum_ptr, norm_ptr, index, first, m, chunk, scale_rows,
    K: tl.constexpr, SPEC: tl.constexpr, G: tl.constexpr, KINDS: tl.constexpr, RANK: tl.constexpr,
    WORLD: tl.constexpr, ON_CUDA: tl.constexpr,
):  # fmt: skip
    # The results of the rows that others own, from this rank's buffer to its outputs.
    scale_at, norm_at, sum_at, WIDTH = result_offsets(chunk * WORLD, K, SPEC)
    address = addresses[RANK] + results
    places, masks = (), ()
    if data_ptr is not None:
        words = at_offset(address, 0, tl.int32)
        places, masks = row_places(places, masks, words, index, first, m, chunk, K, 1, SPEC, G, RANK, WORLD)
        words = at_offset(address, scale_at, tl.int32)
        for rank in tl.static_range(WORLD):
            if rank != RANK:
                row = rank * chunk + index
                group = first + tl.arange(0, G)
                places += (words + row.to(tl.int64) * WIDTH + group,)
                masks += ((group * SPEC.group < K) & (row < m),)
    if norm_ptr is not None:
        words = at_offset(address, norm_at, tl.int32)
        places, masks = row_places(places, masks, words, index, first, m, chunk, K, 2, SPEC, G, RANK, WORLD)
    if sum_ptr is not None:
        words = at_offset(address, sum_at, tl.int32)
        places, masks = row_places(places, masks, words, index, first, m, chunk, K, 2, SPEC, G, RANK, WORLD)
    tiles = wait_for_words(places, masks, addresses, table_ptr, epoch, index, 2, KINDS, RANK, WORLD, ON_CUDA)
    PEERS: tl.constexpr = WORLD - 1
    NORM: tl.constexpr = 2 * PEERS if data_ptr is not None else 0  # the first tile of a norm
    SUM: tl.constexpr = (len(KINDS) - 1) * PEERS
    for i in tl.static_range(PEERS):
        row = (i + (i >= RANK)) * chunk + index
        if data_ptr is not None:
            store_words(data_ptr, tiles[i], row, first, m, K, 1, SPEC, G)
            store_sent_scale(scale_ptr, tiles[PEERS + i], row, first, m, scale_rows, K, SPEC, G, ON_CUDA)
        if norm_ptr is not None:
            store_words(norm_ptr, tiles[NORM + i], row, first, m, K, 2, SPEC, G)
        if sum_ptr is not None:
            store_words(sum_ptr, tiles[SUM + i], row, first, m, K, 2, SPEC, G)


@triton.jit
def row_places(
    places, masks, ptr, index, first, m, chunk, K: tl.constexpr, BYTES: tl.constexpr, SPEC: tl.constexpr,
    G: tl.constexpr, RANK: tl.constexpr, WORLD: tl.constexpr,
):  # fmt: skip
    # places and masks with those of a row of every peer, in a matrix of K values of BYTES bytes each
    for rank in tl.static_range(WORLD):
        if rank != RANK:
            row = rank * chunk + index
            place, mask = word_places(ptr, row.to(tl.int64) * (K * BYTES // 4), first, K, BYTES, SPEC, G)
            places += (place,)
            masks += (mask & (row < m),)
    return places, masks


@triton.jit
def store_words(ptr, words, row, first, m, K: tl.constexpr, BYTES: tl.constexpr, SPEC: tl.constexpr, G: tl.constexpr):
    words_ptr = ptr.to(tl.pointer_type(tl.int32))
    place, mask = word_places(words_ptr, row.to(tl.int64) * (K * BYTES // 4), first, K, BYTES, SPEC, G)
    tl.store(place, words, mask=mask & (row < m))


@triton.jit
def store_sent_scale(
    scale_ptr, words, row, first, m, scale_rows, K: tl.constexpr, SPEC: tl.constexpr, G: tl.constexpr,
    ON_CUDA: tl.constexpr,
):  # fmt: skip
    PER: tl.constexpr = SPEC.scales_per_element
    COLUMNS: tl.constexpr = (K // SPEC.group + PER - 1) // PER
    inside = (first + tl.arange(0, G)) * SPEC.group < K
    value = scale_values(words.to(tl.float32, bitcast=True), inside, SPEC, G)
    column = first // PER + tl.arange(0, G // PER)
    mask = (column < COLUMNS) & (row < m)
    store_scale(scale_ptr, value, row, column, mask, row == m - 1, m, scale_rows, COLUMNS, SPEC, ON_CUDA)
