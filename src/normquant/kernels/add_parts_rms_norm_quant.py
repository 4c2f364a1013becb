"""Sum of parts, residual add, RMSNorm and group quantization, of parts that all lie on this GPU.

    h = round(x_0 + x_1 + ... in rank order, in fp32) + residual, then as `rms_norm_quant`

Bytes moved per row as there, with 2K more read for each part but the first. Grid: the rows, each over a cluster.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from normquant.kernels._cluster import open_mailbox
from normquant.kernels._device import release_dependents, row_offset, wait_for_predecessor
from normquant.kernels._partial_sums import load_part, load_residual, load_values, norm_of_parts, store_sum
from normquant.kernels._rows import store_tile
from normquant.kernels.configs import Config
from normquant.kernels.launch import Plan
from normquant.kernels.parts_plan import STRIDE_UNIT, Outputs, plan_rows, row_strides
from normquant.spec import QuantSpec


@triton.jit(do_not_specialize=["m", "stride_xr", "stride_xm", "stride_rm", "scale_rows", "eps"])
def add_parts_kernel(
    x_ptr,  # [ranks, M, K] bf16 or fp16: the parts of all ranks
    residual_ptr,
    weight_ptr,
    data_ptr,
    scale_ptr,
    sum_ptr,
    norm_ptr,
    m,
    stride_xr,  # in units of 8 values
    stride_xm,
    stride_rm,
    scale_rows,
    eps,
    weight_offset: tl.constexpr,
    K: tl.constexpr,
    SPEC: tl.constexpr,
    G: tl.constexpr,
    CLUSTER: tl.constexpr,
    LOG_WARP: tl.constexpr,
    WORLD: tl.constexpr,
    LATE_WEIGHT: tl.constexpr,
    PDL: tl.constexpr,
    ON_CUDA: tl.constexpr,
):
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    row = tl.program_id(0) // CLUSTER
    first = tl.program_id(0) % CLUSTER * G
    mailbox = None
    if CLUSTER > 1:
        mailbox = open_mailbox(CLUSTER)
    wait_for_predecessor(PDL)
    parts = ()
    for rank in tl.static_range(WORLD):
        part_ptr = x_ptr + row_offset(tl.full((), rank, tl.int32), stride_xr, 8)
        parts += (load_part(part_ptr, row, first, m, stride_xm, K, SPEC, G),)
    residual = load_residual(residual_ptr, row, first, stride_rm, K, SPEC, G)
    weight = None if LATE_WEIGHT else load_values(weight_ptr, 0, first, K, SPEC, G)
    release_dependents(PDL)
    if LATE_WEIGHT:
        weight = load_values(weight_ptr, 0, first, K, SPEC, G)
    total, y = norm_of_parts(
        parts[1:], parts[0], residual, weight, eps, mailbox, weight_offset, DTYPE, K, SPEC, G, CLUSTER, LOG_WARP, 0,
        ON_CUDA,
    )  # fmt: skip
    store_sum(sum_ptr, total, row, first, K, SPEC, G)
    store_tile(y, data_ptr, scale_ptr, norm_ptr, row, first, m, scale_rows, K, SPEC, 1, G, ON_CUDA)


def plan_add_parts(
    parts: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float,
    spec: QuantSpec,
    wanted: Outputs,
    config: Config,
) -> Plan:
    """For the parts of all ranks, [ranks, M, K]: -> data, scale, sum, norm."""
    world, m, _ = parts.shape
    numbers = (m, parts.stride(0) // STRIDE_UNIT, *row_strides(parts[0], residual), spec.scale_rows(m), eps)
    return plan_rows(
        add_parts_kernel, m, (parts, residual, weight), numbers, weight_offset, spec, wanted, config, dict(WORLD=world)
    )
