"""All-reduce, residual add, RMSNorm and group quantization in one launch, of parts that lie on the ranks of a group.

    h = round(x_0 + x_1 + ... in rank order, in fp32) + residual, then as `rms_norm_quant`

One shot: a rank sends its rows to all others, and every rank does every row. One hop; 2K bytes to each peer for a row.
Two shots: a rank sends each row to its owner, which does it and sends what comes out to all. Two hops; to each peer 2K
bytes for a row that it owns, and for an own one K + K/32, with 2K more for the sum, unless it stays with the owner, and
for the norm. The ranks own neighbouring rows, `chunk` each.

A rank's rows may lie there as the partial sums of the product that made them (`partial_rows`): they are added and
rounded before they are sent, so that its peers see the same as with plain rows.

Grid: of one shot the rows, of two shots a rank's own rows, each over a cluster. A program sends before it
waits, and waits only for programs of the same number on other ranks: those get their turn, however many fit on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from normquant.kernels._cluster import leave_mailbox, open_mailbox
from normquant.kernels._device import release_dependents, wait_for_predecessor
from normquant.kernels._exchange import begin, finish, load_addresses
from normquant.kernels._partial_sums import (
    load_own_part,
    load_residual,
    load_values,
    norm_of_parts,
    part_places,
    prefetch_inputs,
    store_sum,
    wait_for_parts,
)
from normquant.kernels._rows import store_tile
from normquant.kernels._sent_rows import gather_rows, send_row
from normquant.kernels.configs import Config
from normquant.kernels.exchange_layout import UNIT_BYTES, Exchange
from normquant.kernels.launch import Plan
from normquant.kernels.partial_rows import PartialRows, partial, row_dtype
from normquant.kernels.parts_plan import Outputs, plan_rows, row_strides
from normquant.spec import QuantSpec


@triton.jit(do_not_specialize=["m", "stride_xm", "stride_rm", "scale_rows", "half_units", "eps"])
def one_shot_kernel(
    x_ptr,  # [M, K] bf16 or fp16, this rank's part, or partial sums of such rows
    residual_ptr,  # [M, K] like x, or None
    weight_ptr,  # [K] bf16, fp16 or fp32
    table_ptr,  # [ranks + 2] int64: as `_exchange` has it
    state_ptr,  # [2] int32: epoch, programs that have ended
    data_ptr,  # [M, K] fp8, or None
    scale_ptr,  # [M, K/group] or [M, ceil(K/group/4)], or None
    sum_ptr,  # [M, K] like x
    norm_ptr,  # [M, K] like x, or None
    m,
    stride_xm,  # in units of 8 values, as stride_rm
    stride_rm,
    scale_rows,
    half_units,
    eps,
    weight_offset: tl.constexpr,
    K: tl.constexpr,
    SPEC: tl.constexpr,
    G: tl.constexpr,  # groups of a program, a power of two
    CLUSTER: tl.constexpr,
    LOG_WARP: tl.constexpr,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    PARTIAL: tl.constexpr,  # whether and how the rows of x are partial sums
    PREFETCH: tl.constexpr,
    LATE_WEIGHT: tl.constexpr,
    PDL: tl.constexpr,
    ON_CUDA: tl.constexpr,
):
    DTYPE: tl.constexpr = row_dtype(PARTIAL, x_ptr.dtype.element_ty)
    row = tl.program_id(0) // CLUSTER
    first = tl.program_id(0) % CLUSTER * G
    mailbox = None
    if CLUSTER > 1:
        mailbox = open_mailbox(CLUSTER)
    addresses = load_addresses(table_ptr, WORLD)
    if PREFETCH:
        prefetch_inputs(x_ptr, residual_ptr, weight_ptr, row, first, stride_xm, stride_rm, K, SPEC, G)
    wait_for_predecessor(PDL)
    epoch, start = begin(state_ptr, half_units)
    own = load_own_part(x_ptr, row, first, m, stride_xm, PARTIAL, K, SPEC, G, ON_CUDA)
    for rank in tl.static_range(WORLD):
        if rank != RANK:
            place, mask = part_places(addresses[rank], start, row, RANK, first, K, SPEC, G, WORLD)
            tl.store(place, own, mask=mask)
    residual = load_residual(residual_ptr, row, first, stride_rm, K, SPEC, G)
    weight = None if LATE_WEIGHT else load_values(weight_ptr, 0, first, K, SPEC, G)
    release_dependents(PDL)
    parts = wait_for_parts(addresses, table_ptr, epoch, start, row, row, first, K, SPEC, G, RANK, WORLD, ON_CUDA)
    if LATE_WEIGHT:
        weight = load_values(weight_ptr, 0, first, K, SPEC, G)
    total, y = norm_of_parts(
        parts, own, residual, weight, eps, mailbox, weight_offset, DTYPE, K, SPEC, G, CLUSTER, LOG_WARP, RANK, ON_CUDA
    )
    store_sum(sum_ptr, total, row, first, K, SPEC, G)
    store_tile(y, data_ptr, scale_ptr, norm_ptr, row, first, m, scale_rows, K, SPEC, 1, G, ON_CUDA)
    finish(state_ptr, epoch)


@triton.jit(do_not_specialize=["m", "chunk", "stride_xm", "stride_rm", "scale_rows", "half_units", "eps"])
def two_shot_kernel(
    x_ptr,  # the first nine as above
    residual_ptr,
    weight_ptr,
    table_ptr,
    state_ptr,
    data_ptr,
    scale_ptr,
    sum_ptr,
    norm_ptr,
    m,
    chunk,  # rows that a rank owns: rank r those from r * chunk on
    stride_xm,
    stride_rm,
    scale_rows,
    half_units,
    eps,
    weight_offset: tl.constexpr,
    K: tl.constexpr,
    SPEC: tl.constexpr,
    G: tl.constexpr,
    CLUSTER: tl.constexpr,
    LOG_WARP: tl.constexpr,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    SHARDED: tl.constexpr,  # of the residual and the sum a rank reads and writes the rows that it owns only
    KINDS: tl.constexpr,  # bytes of a value of each output that is sent, in the order of send_row
    PARTIAL: tl.constexpr,
    PREFETCH: tl.constexpr,
    LATE_WEIGHT: tl.constexpr,
    PDL: tl.constexpr,
    ON_CUDA: tl.constexpr,
):
    DTYPE: tl.constexpr = row_dtype(PARTIAL, x_ptr.dtype.element_ty)
    index = tl.program_id(0) // CLUSTER  # of a row among those of its owner
    first = tl.program_id(0) % CLUSTER * G
    row = RANK * chunk + index
    mailbox = None
    if CLUSTER > 1:
        mailbox = open_mailbox(CLUSTER)
    addresses = load_addresses(table_ptr, WORLD)
    if PREFETCH:
        safe = tl.minimum(row, m - 1)
        prefetch_inputs(x_ptr, residual_ptr, weight_ptr, safe, first, stride_xm, stride_rm, K, SPEC, G)
    wait_for_predecessor(PDL)
    epoch, start = begin(state_ptr, half_units)
    results = start + chunk.to(tl.int64) * (WORLD * 2 * K)  # where the owners' results lie, after the parts

    sent = ()
    for rank in tl.static_range(WORLD):
        sent += (load_own_part(x_ptr, rank * chunk + index, first, m, stride_xm, PARTIAL, K, SPEC, G, ON_CUDA),)
    for rank in tl.static_range(WORLD):
        if rank != RANK:
            place, mask = part_places(addresses[rank], start, index, RANK, first, K, SPEC, G, WORLD)
            tl.store(place, sent[rank], mask=mask & (rank * chunk + index < m))

    if row < m:
        residual = load_residual(residual_ptr, row, first, stride_rm, K, SPEC, G)
        weight = None if LATE_WEIGHT else load_values(weight_ptr, 0, first, K, SPEC, G)
        parts = wait_for_parts(addresses, table_ptr, epoch, start, index, row, first, K, SPEC, G, RANK, WORLD, ON_CUDA)
        if LATE_WEIGHT:
            weight = load_values(weight_ptr, 0, first, K, SPEC, G)
        total, y = norm_of_parts(
            parts, sent[RANK], residual, weight, eps, mailbox, weight_offset, DTYPE, K, SPEC, G, CLUSTER, LOG_WARP,
            RANK, ON_CUDA,
        )  # fmt: skip
        for rank in tl.static_range(WORLD):
            if rank != RANK:
                send_row(
                    addresses[rank] + results, total, y, row, chunk * WORLD, first, DTYPE, K, SPEC, G, SHARDED,
                    data_ptr is not None, norm_ptr is not None, ON_CUDA,
                )  # fmt: skip
        store_sum(sum_ptr, total, row, first, K, SPEC, G)
        store_tile(y, data_ptr, scale_ptr, norm_ptr, row, first, m, scale_rows, K, SPEC, 1, G, ON_CUDA)
    elif CLUSTER > 1:
        leave_mailbox()
    release_dependents(PDL)
    gather_rows(
        addresses, table_ptr, epoch, results, data_ptr, scale_ptr, None if SHARDED else sum_ptr, norm_ptr, index, first,
        m, chunk, scale_rows, K, SPEC, G, KINDS, RANK, WORLD, ON_CUDA,
    )  # fmt: skip
    finish(state_ptr, epoch)


def plan_one_shot(
    x: torch.Tensor | PartialRows,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float,
    spec: QuantSpec,
    wanted: Outputs,
    exchange: Exchange,
    config: Config,
) -> Plan:
    """For checked inputs on every rank: -> data, scale, sum, norm."""
    m = x.shape[0]
    numbers = (m, *row_strides(x, residual), spec.scale_rows(m), exchange.half // UNIT_BYTES, eps)
    return plan_rows(
        one_shot_kernel, m, (x, residual, weight, exchange.table, exchange.state), numbers, weight_offset, spec, wanted,
        config, dict(RANK=exchange.rank, WORLD=exchange.world, PARTIAL=partial(x)), prefetch=True,
    )  # fmt: skip


def plan_two_shot(
    x: torch.Tensor | PartialRows,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float,
    spec: QuantSpec,
    wanted: Outputs,
    exchange: Exchange,
    config: Config,
    sharded: bool,
    of_rows: int | None = None,
) -> Plan:
    """The same; sharded: each rank has only the rows that it owns of the residual, and of the sum.

    of_rows: of the outputs that these rows are written into, from a multiple of 4 on; else they have outputs of their
    own.
    """
    m = x.shape[0]
    chunk = -(-m // exchange.world)
    numbers = (m, chunk, *row_strides(x, residual), spec.scale_rows(of_rows or m), exchange.half // UNIT_BYTES, eps)
    own = dict(
        RANK=exchange.rank, WORLD=exchange.world, SHARDED=sharded, KINDS=wanted.kinds(sharded), PARTIAL=partial(x)
    )  # fmt: skip
    return plan_rows(
        two_shot_kernel, chunk, (x, residual, weight, exchange.table, exchange.state), numbers,
        weight_offset, spec, wanted, config, own, prefetch=True,
    )  # fmt: skip
