"""The product of a few block-quantized rows and a block-FP8 weight, split over K: partial sums in fp32.

    part_p[m, n] = sum over the blocks b of part p, in their order, of (s_a[m, b] * s_w[n/128, b]) * dot_b(m, n)
    dot_b(m, n)  = sum over the 128 values of block b of a[m, k] * w[n, k], in the tensor core

Each block's dot is promoted to fp32 before it is scaled and added, as DeepGEMM does. Whoever reads the parts adds them
in their order (`partial_rows.load_rows`).

Bytes moved for [M, K] by [N, K] in P parts: read NK + NK/4096 once, and M(K + K/32) for each column of programs, from
the L2; written 4PMN. With few rows all of it is the weight, so what counts is that every multiprocessor has bytes on
their way from the first moment to the last: they come in a pipeline of asynchronous copies. The programs of the kernel
behind it are let in at once (`release`): they wait beside this one's, not behind its last. (Asking the L2 for weights
before the wait for the kernel ahead, and tensor map copies, were tried on an H100: neither was faster between readers.)

Grid: (N / columns, parts, M / rows of a program). The weight is the left operand of the tensor core, whose side is 64
at the least; the rows are the right one, of 16 at the least.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from normquant.kernels._device import release_dependents, wait_for_predecessor
from normquant.kernels.capability import multiprocessors, target
from normquant.kernels.launch import Output, Plan, launch, plan
from normquant.kernels.partial_rows import row_stride
from normquant.kernels.product_configs import (
    ProductConfig,
    blocks_of_part,
    product_config,
    rows_of_program,
    shared_memory,
    split_of,
)

ALIGN = 16  # values of data that are loaded at a time


@triton.jit(do_not_specialize=["m", "stride_dm", "stride_sm", "stride_sg", "stride_wn"])
def block_fp8_linear_kernel(
    data_ptr,  # [M, K] fp8, any row stride
    scale_ptr,  # [M, K/128] fp32, any strides
    weight_ptr,  # [N, K] fp8, contiguous
    weight_scale_ptr,  # [ceil(N/128), K/128] fp32, any row stride
    parts_ptr,  # [P * M, N] fp32, rows OUT_STRIDE apart
    m,
    stride_dm,
    stride_sm,
    stride_sg,
    stride_wn,
    N: tl.constexpr,
    K: tl.constexpr,
    PER: tl.constexpr,  # blocks of K in a part
    COLUMNS: tl.constexpr,  # of N that a program takes: one block of the weight, or half of one
    ROWS: tl.constexpr,  # of M that a program takes, a power of two
    STAGES: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    DATA_UNIT: tl.constexpr,
    PDL: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(1)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    first = part * PER
    last = tl.minimum(first + PER, K // 128)
    # What is past the edge is the last row or column once more: it costs no mask, and is not stored.
    wait_for_predecessor(PDL)
    k = tl.arange(0, 128)
    own = tl.minimum(row, m - 1).to(tl.int64)
    weight_at = weight_ptr + tl.minimum(column, N - 1)[:, None].to(tl.int64) * K + k[None, :]
    data_at = data_ptr + own[None, :] * stride_dm * DATA_UNIT + k[:, None]
    scale_at = scale_ptr + own * stride_sm + first.to(tl.int64) * stride_sg
    weight_scale_at = weight_scale_ptr + (tl.program_id(0) * COLUMNS // 128).to(tl.int64) * stride_wn
    total = tl.zeros((COLUMNS, ROWS), tl.float32)
    for block in tl.range(first, last, num_stages=STAGES):
        w = tl.load(weight_at + block * 128)  # [COLUMNS, 128]
        a = tl.load(data_at + block * 128)  # [128, ROWS]
        s = tl.load(scale_at) * tl.load(weight_scale_at + block)  # [ROWS]
        scale_at += stride_sg
        total = tl.fma(tl.dot(w, a), tl.broadcast_to(s[None, :], (COLUMNS, ROWS)), total)
    release_dependents(PDL)
    out = (part * m + row).to(tl.int64)[None, :] * OUT_STRIDE + column[:, None]
    tl.store(parts_ptr + out, total, mask=(row < m)[None, :] & (column < N)[:, None])


def plan_block_fp8_linear(
    data: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    config: ProductConfig | None = None,
    split: int | None = None,
) -> Plan:
    """The launch on checked inputs like these; K in as many parts as K and N say, unless the tuner tries others."""
    (m, k), n = data.shape, weight.shape[0]
    where = target(data.device)
    config = config or product_config(k, n, m, where.capability)
    split = split or split_of(k, n)
    rows, unit = rows_of_program(m), ALIGN if data.stride(0) % ALIGN == 0 or m == 1 else 1
    out = Output((split * m, n), (row_stride(n), 1), torch.float32, split * m * row_stride(n))
    columns = -(-n // config.columns)
    return plan(
        block_fp8_linear_kernel,
        grid=(columns, split, -(-m // rows)),
        inputs=(data, scale, weight, weight_scale),
        outputs=(out,),
        numbers=(m, data.stride(0) // unit, *scale.stride(), weight_scale.stride(0)),
        where=where,
        config=config,
        shared=shared_memory(columns * split, *multiprocessors(data.device)),
        N=n,
        K=k,
        PER=blocks_of_part(k, split),
        COLUMNS=config.columns,
        ROWS=rows,
        STAGES=config.stages,
        OUT_STRIDE=row_stride(n),
        DATA_UNIT=unit,
        PDL=where.release(config),
    )


def block_fp8_linear(
    data: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    config: ProductConfig | None = None,
    split: int | None = None,
) -> torch.Tensor:
    """Launch on checked inputs: data [M, K], weight [N, K] -> partial sums [P * M, N] fp32."""
    inputs = data, scale, weight, weight_scale
    (parts,) = launch(plan_block_fp8_linear(*inputs, config, split), *inputs)
    assert parts is not None
    return parts
