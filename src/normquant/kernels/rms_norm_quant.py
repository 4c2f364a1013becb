"""RMSNorm and group quantization of a row in one pass, optionally after a residual add.

    h    = x + residual                              (or x)
    rstd = rsqrt(sum(h * h) / K + eps)
    y    = h * rstd * (weight + weight_offset)       rounded where SPEC.rounding says
    s_g  = max(amax_g(y), floor) / 448,  q = y / s_g

Bytes moved per row of K bf16 values, group 128, fp32 scales: read 2K, or 4K with a residual; written K + K/32, and 2K
more for each of the stored residual sum and norm. The weight (2K) is read by every program but stays in the L2.

Grid: (M, split). A program reads the whole row for the sum of squares and writes `BLOCK_G` groups of it, so at small M a
row is shared by several programs; every split gives the same bits, since the order of the sum is fixed.
"""

import torch
import triton
import triton.language as tl

from normquant.kernels._device import (
    divide_by_constant,
    quantize,
    release_dependents,
    row_offset,
    scale_by_weight,
    store_scale,
    sum_of_squares,
    wait_for_predecessor,
)
from normquant.kernels.launch import Config, log2, on_device, power_of_two, stride_unit, target
from normquant.kernels.launch import config as choose_config
from normquant.spec import QuantSpec, empty_scale


@triton.jit(do_not_specialize=["m", "stride_xm", "stride_rm", "scale_rows", "eps"])
def rms_norm_quant_kernel(
    x_ptr,  # [M, K] bf16 or fp16, any row stride
    residual_ptr,  # [M, K] like x, or None
    weight_ptr,  # [K] bf16, fp16 or fp32
    data_ptr,  # [M, K] fp8, contiguous
    scale_ptr,  # [M, K/group] or [M, ceil(K/group/4)]
    sum_ptr,  # [M, K] like x, contiguous: x + residual, or None
    norm_ptr,  # [M, K] like x, contiguous: the norm, or None
    m,
    stride_xm,
    stride_rm,
    scale_rows,
    eps,
    weight_offset: tl.constexpr,
    K: tl.constexpr,
    SPEC: tl.constexpr,
    GROUPS: tl.constexpr,  # groups of a row, rounded up to a power of two
    LOG_GROUPS: tl.constexpr,
    LOG_GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,  # groups that a program writes, a power of two
    STRIDE_UNIT: tl.constexpr,
    PDL: tl.constexpr,
    ON_CUDA: tl.constexpr,
):
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    GROUP: tl.constexpr = SPEC.group
    HAS_RESIDUAL: tl.constexpr = residual_ptr is not None
    row = tl.program_id(0)
    first = tl.program_id(1) * BLOCK_G
    x_ptr += row_offset(row, stride_xm, STRIDE_UNIT)
    if HAS_RESIDUAL:
        residual_ptr += row_offset(row, stride_rm, STRIDE_UNIT)
    in_group = tl.arange(0, GROUP)[None, :]
    whole = tl.arange(0, GROUPS)[:, None] * GROUP + in_group  # [GROUPS, GROUP]
    own = (first + tl.arange(0, BLOCK_G)[:, None]) * GROUP + in_group  # [BLOCK_G, GROUP]

    wait_for_predecessor(PDL)
    h = load_row(x_ptr, residual_ptr, whole, K, SPEC, DTYPE, HAS_RESIDUAL)
    if BLOCK_G == GROUPS:
        h_own = h
    else:
        h_own = load_row(x_ptr, residual_ptr, own, K, SPEC, DTYPE, HAS_RESIDUAL)
    w = tl.load(weight_ptr + own, mask=own < K, other=0.0).to(tl.float32)
    release_dependents(PDL)

    out = row.to(tl.int64) * K + own
    if HAS_RESIDUAL:
        tl.store(sum_ptr + out, h_own.to(DTYPE), mask=own < K)
        if SPEC.sum == "rounded":
            h = h.to(DTYPE).to(tl.float32)
            h_own = h_own.to(DTYPE).to(tl.float32)
    if weight_offset != 0.0:
        w += weight_offset
    mean = divide_by_constant(sum_of_squares(h, GROUPS, GROUP, LOG_GROUPS, LOG_GROUP), K, ON_CUDA)
    y = scale_by_weight(h_own * tl.rsqrt(mean + eps), w, SPEC, DTYPE)
    if norm_ptr is not None:
        tl.store(norm_ptr + out, y.to(DTYPE), mask=own < K)
    q, s = quantize(y, SPEC, ON_CUDA)
    tl.store(data_ptr + out, q, mask=own < K)
    store_scale(scale_ptr, s, row, first, K // GROUP, m, scale_rows, K, SPEC, BLOCK_G)


@triton.jit
def load_row(
    x_ptr, residual_ptr, at, K: tl.constexpr, SPEC: tl.constexpr, DTYPE: tl.constexpr, HAS_RESIDUAL: tl.constexpr
):
    h = tl.load(x_ptr + at, mask=at < K, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        h += tl.load(residual_ptr + at, mask=at < K, other=0.0).to(tl.float32)
    return h


def rms_norm_quant(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    spec: QuantSpec,
    weight_offset: float = 0.0,
    return_norm: bool = False,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Launch on checked inputs: -> data, scale, x + residual (None without residual), norm (None unless asked for)."""
    m, k = x.shape
    where = target(x.device)
    data = torch.empty((m, k), dtype=spec.dtype, device=x.device)
    scale = empty_scale(m, k, spec, x.device)
    total = torch.empty((m, k), dtype=x.dtype, device=x.device) if residual is not None else None
    norm = torch.empty((m, k), dtype=x.dtype, device=x.device) if return_norm else None
    if m == 0:
        return data, scale, total, norm
    if config is None:
        config = choose_config("rms_norm_quant" if residual is None else "add_rms_norm_quant", k, m, where.capability)
    groups = k // spec.group
    block_g = power_of_two(-(-groups // config.split))
    if spec.scale == "ue8m0_packed":
        block_g = max(4, block_g)  # a program writes whole int32
    unit = stride_unit(x, residual)
    padded = max(power_of_two(groups), block_g)
    with on_device(x.device):
        rms_norm_quant_kernel[(m, -(-groups // block_g))](
            x,
            residual,
            weight,
            data,
            scale,
            total,
            norm,
            m,
            x.stride(0) // unit,
            residual.stride(0) // unit if residual is not None else 0,
            spec.scale_rows(m),
            eps,
            weight_offset,
            K=k,
            SPEC=spec,
            GROUPS=padded,
            LOG_GROUPS=log2(padded),
            LOG_GROUP=log2(spec.group),
            BLOCK_G=block_g,
            STRIDE_UNIT=unit,
            PDL=where.pdl,
            ON_CUDA=where.on_cuda,
            **where.options(config),
        )
    return data, scale, total, norm
