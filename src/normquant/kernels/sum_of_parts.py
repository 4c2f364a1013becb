"""The sum of a product's partial sums, for a product whose reader is no kernel of ours.

    y = round(part_0 + part_1 + ... in their order, in fp32)

Bytes moved for P parts of [M, N] into 16-bit values: read 4PMN, from the L2, written 2MN. Grid: M * N / BLOCK.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from normquant.kernels._device import release_dependents, wait_for_predecessor
from normquant.kernels.capability import target
from normquant.kernels.configs import Config
from normquant.kernels.launch import Plan, launch, matrix, plan
from normquant.kernels.partial_rows import ROW_ALIGN, PartialRows, load_rows, partial, row_stride

CONFIG = Config(4)
BLOCK = 1024  # values of a program: eight for each thread, two loads of 16 bytes for each part


@triton.jit(do_not_specialize=["m"])
def sum_of_parts_kernel(
    parts_ptr,  # [P * M, N] fp32, rows STRIDE apart
    out_ptr,  # [M, N], contiguous
    m,
    N: tl.constexpr,
    STRIDE: tl.constexpr,  # a multiple of STRIDE_UNIT
    PARTIAL: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    PDL: tl.constexpr,
    ON_CUDA: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, column = index // STRIDE, index % STRIDE
    mask = (row < m) & (column < N)
    wait_for_predecessor(PDL)
    x = load_rows(parts_ptr, row, column, mask, m, STRIDE // STRIDE_UNIT, PARTIAL, STRIDE_UNIT, ON_CUDA)
    release_dependents(PDL)
    tl.store(out_ptr + row * N + column, x.to(out_ptr.dtype.element_ty), mask=mask)


def plan_sum_of_parts(x: PartialRows) -> Plan:
    """The launch for partial sums of these rows."""
    where = target(x.device)
    return plan(
        sum_of_parts_kernel,
        grid=(-(-x.m * row_stride(x.k) // BLOCK), 1, 1),
        inputs=(x,),
        outputs=(matrix(x.m, x.k, x.dtype),),
        numbers=(x.m,),
        where=where,
        config=CONFIG,
        N=x.k,
        STRIDE=row_stride(x.k),
        PARTIAL=partial(x),
        BLOCK=BLOCK,
        STRIDE_UNIT=ROW_ALIGN,
        PDL=where.release(CONFIG),
        ON_CUDA=where.on_cuda,
    )


def sum_of_parts(parts: torch.Tensor, x: PartialRows) -> torch.Tensor:
    """Launch: partial sums [P * M, N] fp32 of the rows x -> [M, N] in their dtype."""
    (out,) = launch(plan_sum_of_parts(x), parts)
    assert out is not None
    return out
