"""Group quantization of activations that are already normed or come from elsewhere.

    s_g = max(amax_g(x), floor) / 448,  q = x / s_g

Bytes moved per row of K bf16 values, group 128, fp32 scales: read 2K, written K + K/32.

Grid: groups / BLOCK_G. Groups are independent, so they are numbered through all rows and a program takes `BLOCK_G`
neighbours, whether of one row or of several: no thread is left without work where a row is no power of two.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from normquant.kernels._device import own_groups, quantize_groups, release_dependents, wait_for_predecessor
from normquant.kernels.capability import target
from normquant.kernels.configs import Config
from normquant.kernels.configs import config as choose_config
from normquant.kernels.launch import Output, Outputs, Plan, kernel_spec, launch, plan, quantized
from normquant.kernels.partial_rows import PartialRows, load_rows, partial
from normquant.kernels.tiling import group_blocks, stride_unit
from normquant.spec import QuantSpec


@triton.jit(do_not_specialize=["m", "stride_xm", "scale_rows"])
def group_quant_kernel(
    x_ptr,  # [M, K] bf16 or fp16, any row stride, or partial sums of such rows
    data_ptr,  # [M, K] fp8, contiguous
    scale_ptr,  # [M, K/group] or [M, ceil(K/group/4)]
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
):
    row, column, mask = own_groups(m, K, SPEC, BLOCK_G)
    wait_for_predecessor(PDL)
    x = load_rows(x_ptr, row, column, mask, m, stride_xm, PARTIAL, STRIDE_UNIT, ON_CUDA)
    release_dependents(PDL)
    quantize_groups(x, data_ptr, scale_ptr, m, scale_rows, K=K, SPEC=SPEC, BLOCK_G=BLOCK_G, ON_CUDA=ON_CUDA)


def plan_groups(
    kernel: Any,
    op: str,
    x: torch.Tensor | PartialRows,
    k: int,
    spec: QuantSpec,
    config: Config | None,
    *more: Output | None,
    **own: Any,
) -> Plan:
    """The launch of a kernel with the arguments of `group_quant_kernel`, which writes [M, k] from rows of x.

    more: what it writes beside data and scale, after them among its arguments; None for what is not asked for.
    own: constants that the kernel has behind those of `group_quant_kernel`.
    """
    m = x.shape[0]
    spec = spec.at(m)
    where = target(x.device)
    config = config or choose_config(op, k, m, where.capability, isinstance(x, PartialRows))
    block_g, programs = group_blocks(m, k, spec, config)
    unit = stride_unit(x)
    return plan(
        kernel,
        grid=(programs, 1, 1),
        inputs=(x,),
        outputs=(*quantized(m, k, spec), *more),
        numbers=(m, x.stride(0) // unit, spec.scale_rows(m)),
        where=where,
        config=config,
        K=k,
        SPEC=kernel_spec(spec),
        PARTIAL=partial(x),
        BLOCK_G=block_g,
        STRIDE_UNIT=unit,
        PDL=where.release(config),
        ON_CUDA=where.on_cuda,
        **own,
    )


def plan_group_quant(x: torch.Tensor | PartialRows, spec: QuantSpec, config: Config | None = None) -> Plan:
    """The launch of `group_quant` on checked inputs like these."""
    return plan_groups(group_quant_kernel, "group_quant", x, x.shape[1], spec, config)


def group_quant(x: torch.Tensor, spec: QuantSpec, config: Config | None = None) -> Outputs:
    """Launch on checked inputs: -> data, scale."""
    return launch(plan_group_quant(x, spec, config), x)
