"""SiLU-gated product of the two halves of a row, quantized in groups: what stands between the two GEMMs of an MLP.

    y = silu(gate) * up,  silu(g) = g / (1 + exp(-g))     rounded where SPEC.rounding says, silu being the inner value
    with a limit L: min(gate, L) in place of gate, max(min(up, L), -L) in place of up
    s_g = max(amax_g(y), floor) / 448,  q = y / s_g

Bytes moved per row of 2K bf16 values, group 128, fp32 scales: read 4K, written K + K/32, and 2K more for the product
where that is stored, too.

Grid: groups / BLOCK_G, numbered through all rows.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from normquant.kernels._device import (
    own_groups,
    quantize_groups,
    release_dependents,
    scale_by_weight,
    wait_for_predecessor,
)
from normquant.kernels._silu import silu
from normquant.kernels.configs import Config
from normquant.kernels.group_quant import plan_groups
from normquant.kernels.launch import Outputs, Plan, launch, matrix
from normquant.kernels.partial_rows import PartialRows, load_rows, row_dtype
from normquant.spec import QuantSpec


@triton.jit(do_not_specialize=["m", "stride_xm", "scale_rows"])
def silu_mul_quant_kernel(
    x_ptr,  # [M, 2K] bf16 or fp16, gate then up, any row stride, or partial sums of such rows
    data_ptr,  # [M, K] fp8, contiguous
    scale_ptr,  # [M, K/group] or [M, ceil(K/group/4)]
    product_ptr,  # [M, K] like x, contiguous: the product, or None
    m,
    stride_xm,
    scale_rows,
    K: tl.constexpr,
    SPEC: tl.constexpr,
    PARTIAL: tl.constexpr,
    BLOCK_G: tl.constexpr,  # groups that a program quantizes, a power of two
    STRIDE_UNIT: tl.constexpr,
    PDL: tl.constexpr,
    ON_CUDA: tl.constexpr,
    LIMIT: tl.constexpr,  # None, or a value of x's dtype
):
    row, column, mask = own_groups(m, K, SPEC, BLOCK_G)
    wait_for_predecessor(PDL)
    gate = load_rows(x_ptr, row, column, mask, m, stride_xm, PARTIAL, STRIDE_UNIT, ON_CUDA)  # [BLOCK_G, group]
    up = load_rows(x_ptr, row, K + column, mask, m, stride_xm, PARTIAL, STRIDE_UNIT, ON_CUDA)
    release_dependents(PDL)
    if LIMIT is not None:  # NaN stays NaN, as in torch.clamp
        gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.maximum(up, -LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.minimum(up, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    y = scale_by_weight(silu(gate, ON_CUDA), up, SPEC, row_dtype(PARTIAL, x_ptr.dtype.element_ty), ON_CUDA)
    if product_ptr is not None:
        tl.store(product_ptr + row.to(tl.int64) * K + column, y.to(product_ptr.dtype.element_ty), mask=mask)
    quantize_groups(y, data_ptr, scale_ptr, m, scale_rows, K=K, SPEC=SPEC, BLOCK_G=BLOCK_G, ON_CUDA=ON_CUDA)


@cache
def rounded(limit: float, dtype: torch.dtype) -> float:
    """A limit as torch's clamp has it, in the dtype of what is clamped."""
    return torch.tensor(limit, dtype=dtype, device="cpu").item()


def plan_silu_mul_quant(
    x: torch.Tensor | PartialRows,
    spec: QuantSpec,
    config: Config | None = None,
    limit: float | None = None,
    return_product: bool = False,
) -> Plan:
    """The launch of `silu_mul_quant` on checked inputs like these."""
    m, k = x.shape[0], x.shape[1] // 2
    product = matrix(m, k, x.dtype) if return_product else None
    in_dtype = None if limit is None else rounded(limit, x.dtype)
    return plan_groups(silu_mul_quant_kernel, "silu_mul_quant", x, k, spec, config, product, LIMIT=in_dtype)


def silu_mul_quant(
    x: torch.Tensor,
    spec: QuantSpec,
    config: Config | None = None,
    limit: float | None = None,
    return_product: bool = False,
) -> Outputs:
    """Launch on checked inputs: x [M, 2K] -> data [M, K], scale, product [M, K] or None."""
    return launch(plan_silu_mul_quant(x, spec, config, limit, return_product), x)
