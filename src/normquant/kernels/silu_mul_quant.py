"""SiLU-gated product of the two halves of a row, quantized in groups: what stands between the two GEMMs of an MLP.

    y = silu(gate) * up,  silu(g) = g / (1 + exp(-g))     rounded where SPEC.rounding says, silu being the inner value
    s_g = max(amax_g(y), floor) / 448,  q = y / s_g

Bytes moved per row of 2K bf16 values, group 128, fp32 scales: read 4K, written K + K/32.

Grid: (M, split). Groups are independent, so a program quantizes `BLOCK_G` groups of one row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

from normquant.kernels._device import (
    quantize,
    release_dependents,
    row_offset,
    scale_by_weight,
    store_scale,
    wait_for_predecessor,
)
from normquant.kernels.launch import Config, on_device, own_groups, stride_unit, target
from normquant.kernels.launch import config as choose_config
from normquant.spec import QuantSpec, empty_scale


@triton.jit(do_not_specialize=["m", "stride_xm", "scale_rows"])
def silu_mul_quant_kernel(
    x_ptr,  # [M, 2K] bf16 or fp16, gate then up, any row stride
    data_ptr,  # [M, K] fp8, contiguous
    scale_ptr,  # [M, K/group] or [M, ceil(K/group/4)]
    m,
    stride_xm,
    scale_rows,
    K: tl.constexpr,
    SPEC: tl.constexpr,
    BLOCK_G: tl.constexpr,  # groups that a program quantizes, a power of two
    STRIDE_UNIT: tl.constexpr,
    PDL: tl.constexpr,
    ON_CUDA: tl.constexpr,
):
    row = tl.program_id(0)
    first = tl.program_id(1) * BLOCK_G
    own = (first + tl.arange(0, BLOCK_G)[:, None]) * SPEC.group + tl.arange(0, SPEC.group)[None, :]  # [BLOCK_G, group]
    x_ptr += row_offset(row, stride_xm, STRIDE_UNIT)
    wait_for_predecessor(PDL)
    gate = tl.load(x_ptr + own, mask=own < K, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + K + own, mask=own < K, other=0.0).to(tl.float32)
    release_dependents(PDL)
    y = scale_by_weight(silu(gate, ON_CUDA), up, SPEC, x_ptr.dtype.element_ty, ON_CUDA)
    q, s = quantize(y, SPEC, ON_CUDA)
    tl.store(data_ptr + row.to(tl.int64) * K + own, q, mask=own < K)
    store_scale(scale_ptr, s, row, first, m, scale_rows, K, SPEC, BLOCK_G)


@triton.jit
def silu(g, ON_CUDA: tl.constexpr):
    # expf and the division are those of torch's CUDA kernel: the approximate ones would move values across a rounding.
    e = libdevice.exp(g * -1.0) if ON_CUDA else tl.exp(g * -1.0)
    return tl.div_rn(g, 1.0 + e)


def silu_mul_quant(x: torch.Tensor, spec: QuantSpec, config: Config | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch on checked inputs: x [M, 2K] -> data [M, K], scale."""
    m, k = x.shape[0], x.shape[1] // 2
    where = target(x.device)
    data = torch.empty((m, k), dtype=spec.dtype, device=x.device)
    scale = empty_scale(m, k, spec, x.device)
    if m == 0:
        return data, scale
    config = config or choose_config("silu_mul_quant", k, m, where.capability)
    block_g, programs = own_groups(k, spec, config)
    unit = stride_unit(x)
    with on_device(x.device):
        silu_mul_quant_kernel[(m, programs)](
            x,
            data,
            scale,
            m,
            x.stride(0) // unit,
            spec.scale_rows(m),
            K=k,
            SPEC=spec,
            BLOCK_G=block_g,
            STRIDE_UNIT=unit,
            PDL=where.pdl,
            ON_CUDA=where.on_cuda,
            **where.options(config),
        )
    return data, scale
