"""RMSNorm of every head, gated, and group quantization of the row: what a gated delta net has before its projection.

    rstd = rsqrt(sum(x * x) / D + eps)               of each head, D values
    n    = x * rstd * weight                         rounded where SPEC.rounding says
    y    = n * silu(z)                               rounded to the dtype of x
    s_g  = max(amax_g(y), floor) / 448,  q = y / s_g

Bytes moved per row of K bf16 values, group 128, fp32 scales: read 4K, written K + K/32. The weight has D values.

Grid: groups / BLOCK_G, numbered through all rows, as in `group_quant`. A head is a power of two and lies in one
program: it is a part of a group, a group, or neighbouring groups, of which a program takes a multiple.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from normquant.kernels._device import (
    divide_by_constant,
    own_groups,
    quantize_groups,
    release_dependents,
    round_to,
    row_offset,
    scale_by_weight,
    wait_for_predecessor,
)
from normquant.kernels._rows import sums_of_squares
from normquant.kernels._silu import silu
from normquant.kernels.capability import target
from normquant.kernels.configs import Config
from normquant.kernels.configs import config as choose_config
from normquant.kernels.launch import Outputs, Plan, kernel_spec, launch, plan, quantized
from normquant.kernels.partial_rows import PartialRows, load_rows, partial, row_dtype
from normquant.kernels.tiling import group_blocks, log_warp, stride_unit
from normquant.spec import QuantSpec


@triton.jit(do_not_specialize=["m", "stride_xm", "stride_zm", "scale_rows", "eps"])
def gated_norm_quant_kernel(
    x_ptr,  # [M, H * D] bf16 or fp16, any row stride, or partial sums of such rows
    z_ptr,  # [M, H * D] like x, any row stride
    weight_ptr,  # [D] bf16, fp16 or fp32
    data_ptr,  # [M, H * D] fp8, contiguous
    scale_ptr,  # [M, H * D/group] or [M, ceil(H * D/group/4)]
    m,
    stride_xm,
    stride_zm,
    scale_rows,
    eps,
    K: tl.constexpr,  # H * D
    D: tl.constexpr,  # a power of two
    SPEC: tl.constexpr,
    PARTIAL: tl.constexpr,
    BLOCK_G: tl.constexpr,  # groups that a program quantizes, a power of two, whole heads
    LOG_WARP: tl.constexpr,  # log2 of the neighbours of a head that one warp holds
    STRIDE_UNIT: tl.constexpr,
    PDL: tl.constexpr,
    ON_CUDA: tl.constexpr,
):
    DTYPE: tl.constexpr = row_dtype(PARTIAL, x_ptr.dtype.element_ty)
    row, column, mask = own_groups(m, K, SPEC, BLOCK_G)
    wait_for_predecessor(PDL)
    x = load_rows(x_ptr, row, column, mask, m, stride_xm, PARTIAL, STRIDE_UNIT, ON_CUDA)  # [BLOCK_G, group]
    z = tl.load(z_ptr + row_offset(row, stride_zm, STRIDE_UNIT) + column, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weight_ptr + column % D).to(tl.float32)
    release_dependents(PDL)
    n = x * rstd_of_heads(x, eps, D, SPEC, BLOCK_G, LOG_WARP, ON_CUDA)
    y = round_to(scale_by_weight(n, w, SPEC, DTYPE, ON_CUDA) * silu(z, ON_CUDA), DTYPE, ON_CUDA)
    quantize_groups(y, data_ptr, scale_ptr, m, scale_rows, K=K, SPEC=SPEC, BLOCK_G=BLOCK_G, ON_CUDA=ON_CUDA)


@triton.jit
def rstd_of_heads(
    x, eps, D: tl.constexpr, SPEC: tl.constexpr, BLOCK_G: tl.constexpr, LOG_WARP: tl.constexpr, ON_CUDA: tl.constexpr
):
    # x [BLOCK_G, group] fp32, whole heads -> for each value 1 / sqrt(mean(x * x) + eps) of its head; a scalar of one.
    HEADS: tl.constexpr = BLOCK_G * SPEC.group // D
    s = sums_of_squares(x, HEADS, D, LOG_WARP)
    rstd = tl.rsqrt(divide_by_constant(s, D, ON_CUDA) + eps)
    if HEADS > 1:
        rstd = tl.reshape(tl.broadcast_to(rstd[:, None], (HEADS, D)), (BLOCK_G, SPEC.group))
    return rstd


def plan_gated_norm_quant(
    x: torch.Tensor | PartialRows,
    z: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    spec: QuantSpec,
    config: Config | None = None,
) -> Plan:
    """The launch of `gated_norm_quant` on checked inputs like these."""
    (m, k), d = x.shape, weight.shape[0]
    spec = spec.at(m)
    where = target(x.device)
    config = config or choose_config("gated_norm_quant", k, m, where.capability, isinstance(x, PartialRows))
    block_g, programs = group_blocks(m, k, spec, config, least=d // spec.group)
    unit = stride_unit(x, z)
    return plan(
        gated_norm_quant_kernel,
        grid=(programs, 1, 1),
        inputs=(x, z, weight),
        outputs=quantized(m, k, spec),
        numbers=(m, x.stride(0) // unit, z.stride(0) // unit, spec.scale_rows(m), eps),
        where=where,
        config=config,
        K=k,
        D=d,
        SPEC=kernel_spec(spec),
        PARTIAL=partial(x),
        BLOCK_G=block_g,
        LOG_WARP=log_warp(d, block_g * spec.group, config.num_warps),
        STRIDE_UNIT=unit,
        PDL=where.release(config),
        ON_CUDA=where.on_cuda,
    )


def gated_norm_quant(
    x: torch.Tensor,
    z: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    spec: QuantSpec,
    config: Config | None = None,
) -> Outputs:
    """Launch on checked inputs: x, z [M, H * D], weight [D] -> data [M, H * D], scale."""
    return launch(plan_gated_norm_quant(x, z, weight, eps, spec, config), x, z, weight)
