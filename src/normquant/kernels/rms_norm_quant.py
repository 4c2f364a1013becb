"""RMSNorm and group quantization of a row in one pass, optionally after a residual add.

    h    = x + residual                              (or x)
    rstd = rsqrt(sum(h * h) / K + eps)
    y    = h * rstd * (weight + weight_offset)       rounded where SPEC.rounding says
    s_g  = max(amax_g(y), floor) / 448,  q = y / s_g

Bytes moved per row of K bf16 values, group 128, fp32 scales: read 2K, or 4K with a residual; written K + K/32, and 2K
more for each of the stored residual sum and norm. The weight (2K) is read by every program but stays in the L2.

Grid: (M / rows, split). Several programs may share a row, each of which writes some groups of it. They are a cluster
and tell each other their sums of squares, or else each reads the whole row for its sum. At large M and small K one
program takes several rows. Every config gives the same bits, since the order of the sum is fixed.
"""

import torch
import triton
import triton.language as tl

from normquant.kernels._cluster import open_mailbox
from normquant.kernels._device import row_offset, wait_for_predecessor
from normquant.kernels._rows import norm_quant_rows, power_of_two, prefetch_row
from normquant.kernels.capability import target
from normquant.kernels.configs import Config
from normquant.kernels.configs import config as choose_config
from normquant.kernels.launch import Outputs, Plan, kernel_spec, launch, matrix, plan, quantized
from normquant.kernels.partial_rows import PartialRows, partial
from normquant.kernels.tiling import divided, stride_unit
from normquant.spec import QuantSpec


@triton.jit(do_not_specialize=["m", "stride_xm", "stride_rm", "scale_rows", "eps"])
def rms_norm_quant_kernel(
    x_ptr,  # [M, K] bf16 or fp16, any row stride, or partial sums of such rows
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
    PARTIAL: tl.constexpr,
    ROWS: tl.constexpr,  # rows of a program, a power of two
    CLUSTER: tl.constexpr,  # programs of a row that exchange sums, or 1
    TILES: tl.constexpr,  # groups of each tile of a row, powers of two
    OWN: tl.constexpr,  # groups of each tile that a program writes
    LOG_WARPS: tl.constexpr,  # for each of TILES log2 of the neighbouring values that one warp holds
    PREFETCH: tl.constexpr,  # into the L2, before the wait for the predecessor
    LATE_WEIGHT: tl.constexpr,
    EVICT_FIRST: tl.constexpr,
    KEEP_SUM: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    PDL: tl.constexpr,
    ON_CUDA: tl.constexpr,
):
    first_row = tl.program_id(0) // CLUSTER * ROWS
    part = tl.program_id(1)
    mailbox = None
    if CLUSTER > 1:
        part = tl.program_id(0) % CLUSTER
        mailbox = open_mailbox(CLUSTER)
    if PREFETCH:
        READ: tl.constexpr = TILES[0] * SPEC.group if CLUSTER > 1 else power_of_two(K)
        first = part * READ if CLUSTER > 1 else 0
        x_row = x_ptr + row_offset(first_row, stride_xm, STRIDE_UNIT)
        residual_row = residual_ptr
        if residual_ptr is not None:
            residual_row += row_offset(first_row, stride_rm, STRIDE_UNIT)
        prefetch_row(x_row, residual_row, weight_ptr, first, READ, K)
    wait_for_predecessor(PDL)
    norm_quant_rows(
        x_ptr=x_ptr, residual_ptr=residual_ptr, weight_ptr=weight_ptr, data_ptr=data_ptr, scale_ptr=scale_ptr,
        sum_ptr=sum_ptr, norm_ptr=norm_ptr, stride_xm=stride_xm, stride_rm=stride_rm, first_row=first_row, part=part,
        m=m, scale_rows=scale_rows, eps=eps, mailbox=mailbox, weight_offset=weight_offset, K=K, SPEC=SPEC,
        PARTIAL=PARTIAL, ROWS=ROWS, CLUSTER=CLUSTER, TILES=TILES, OWN=OWN, LOG_WARPS=LOG_WARPS,
        LATE_WEIGHT=LATE_WEIGHT, EVICT_FIRST=EVICT_FIRST, KEEP_SUM=KEEP_SUM, STRIDE_UNIT=STRIDE_UNIT, PDL=PDL,
        ON_CUDA=ON_CUDA,
    )  # fmt: skip


def op_name(with_residual: bool, with_norm: bool) -> str:
    """The op of these inputs and outputs, which is also its name in the table of configs."""
    return f"{'add_' if with_residual else ''}rms_norm_quant{'_with_norm' if with_norm else ''}"


def plan_rms_norm_quant(
    x: torch.Tensor | PartialRows,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    spec: QuantSpec,
    weight_offset: float = 0.0,
    return_norm: bool = False,
    config: Config | None = None,
) -> Plan:
    """The launch of `rms_norm_quant` on checked inputs like these."""
    m, k = x.shape
    spec = spec.at(m)
    where = target(x.device)
    if config is None:
        name = op_name(residual is not None, return_norm)
        config = choose_config(name, k, m, where.capability, isinstance(x, PartialRows))
    row = divided(k, spec, config, where.clusters)
    unit = stride_unit(x, residual)
    return plan(
        rms_norm_quant_kernel,
        grid=(-(-m // config.rows), row.programs // row.cluster, 1),
        inputs=(x, residual, weight),
        outputs=(
            *quantized(m, k, spec),
            matrix(m, k, x.dtype) if residual is not None else None,
            matrix(m, k, x.dtype) if return_norm else None,
        ),
        numbers=(
            m,
            x.stride(0) // unit,
            residual.stride(0) // unit if residual is not None else 0,
            spec.scale_rows(m),
            eps,
        ),
        where=where,
        config=config,
        cluster=row.cluster,
        weight_offset=weight_offset,
        K=k,
        SPEC=kernel_spec(spec),
        PARTIAL=partial(x),
        ROWS=config.rows,
        CLUSTER=row.cluster,
        TILES=row.tiles,
        OWN=row.own,
        LOG_WARPS=row.log_warps,
        PREFETCH=config.prefetch and where.pdl and not isinstance(x, PartialRows),
        LATE_WEIGHT=config.late_weight,
        EVICT_FIRST=config.evict_first,
        KEEP_SUM=config.keep_sum,
        STRIDE_UNIT=unit,
        PDL=where.release(config),
        ON_CUDA=where.on_cuda,
    )


def rms_norm_quant(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    spec: QuantSpec,
    weight_offset: float = 0.0,
    return_norm: bool = False,
    config: Config | None = None,
) -> Outputs:
    """Launch on checked inputs: -> data, scale, x + residual (None without residual), norm (None unless asked for)."""
    planned = plan_rms_norm_quant(x, residual, weight, eps, spec, weight_offset, return_norm, config)
    return launch(planned, x, residual, weight)
