"""The latents of multi-head latent attention, from the fused qkv_a projection, in one launch.

A row of the projection is [q_a | kv_a | k_pe], 1536 + 512 + 64 values for DeepSeek-R1:

    q_a   RMSNorm, quantized in groups               -> what q_b_proj reads
    kv_a  RMSNorm in the activation dtype            -> what the kv cache holds
          and, if asked for, quantized in groups     -> what kv_b_proj reads
    k_pe  rotary position embedding                  -> what the kv cache holds beside kv_a

Bytes moved per row in bf16, with Q, C and R the three widths, group 128, fp32 scales: read 2(Q + C + R) and 2R of cos
and sin; written Q + Q/32 + 2C + 2R, and C + C/32 more with quantized kv_a.

Grid: M / rows * PARTS. The last of the PARTS programs of a row does kv_a and k_pe, the others share q_a, each reading
all of it for the sum of squares. They are neighbours in the grid, so that a contiguous row is read at one time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from normquant.kernels._device import row_offset, wait_for_predecessor
from normquant.kernels._rope import load_angles, load_pairs, positions, rotate, store_pairs
from normquant.kernels._rows import norm_quant_rows
from normquant.kernels.capability import target
from normquant.kernels.configs import Config
from normquant.kernels.configs import config as choose_config
from normquant.kernels.launch import Outputs, Plan, kernel_spec, launch, matrix, plan, quantized
from normquant.kernels.partial_rows import PartialRows, partial, row_dtype
from normquant.kernels.tiling import divided, power_of_two, stride_unit, unsplit
from normquant.spec import QuantSpec


@triton.jit(do_not_specialize=["m", "stride_xm", "stride_cos", "stride_sin", "scale_rows", "eps"])
def latent_norm_quant_kernel(
    x_ptr,  # [M, Q + C + R] bf16 or fp16, any row stride, or partial sums of such rows
    q_weight_ptr,  # [Q]
    kv_weight_ptr,  # [C]
    cos_ptr,  # [positions, R/2], any row stride
    sin_ptr,  # like cos
    position_ptr,  # [M] int32 or int64, or None: row i is at position i
    q_data_ptr,  # [M, Q] fp8
    q_scale_ptr,
    kv_norm_ptr,  # [M, C] like x
    k_pe_ptr,  # [M, R] like x
    kv_data_ptr,  # [M, C] fp8, or None
    kv_scale_ptr,
    m,
    stride_xm,
    stride_cos,
    stride_sin,
    scale_rows,
    eps,
    Q: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    ROPE: tl.constexpr,
    SPEC: tl.constexpr,
    PARTIAL: tl.constexpr,
    PARTS: tl.constexpr,  # programs of a row
    ROWS: tl.constexpr,  # rows of a program, a power of two
    Q_TILES: tl.constexpr,
    Q_OWN: tl.constexpr,  # of the groups of q_a that a program writes
    LOG_Q_WARPS: tl.constexpr,
    C_TILES: tl.constexpr,
    LOG_C_WARPS: tl.constexpr,
    R_BLOCK: tl.constexpr,
    LATE_WEIGHT: tl.constexpr,
    EVICT_FIRST: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    ANGLE_UNIT: tl.constexpr,
    PDL: tl.constexpr,
    ON_CUDA: tl.constexpr,
):
    first_row = tl.program_id(0) // PARTS * ROWS
    part = tl.program_id(0) % PARTS
    wait_for_predecessor(PDL)
    if part < PARTS - 1:
        norm_quant_rows(
            x_ptr=x_ptr, residual_ptr=None, weight_ptr=q_weight_ptr, data_ptr=q_data_ptr, scale_ptr=q_scale_ptr,
            sum_ptr=None, norm_ptr=None, stride_xm=stride_xm, stride_rm=0, first_row=first_row, part=part, m=m,
            scale_rows=scale_rows, eps=eps, mailbox=None, weight_offset=0.0, K=Q, SPEC=SPEC, PARTIAL=PARTIAL,
            ROWS=ROWS, CLUSTER=1, TILES=Q_TILES, OWN=Q_OWN, LOG_WARPS=LOG_Q_WARPS, LATE_WEIGHT=LATE_WEIGHT,
            EVICT_FIRST=EVICT_FIRST, KEEP_SUM=False, STRIDE_UNIT=STRIDE_UNIT, PDL=PDL, ON_CUDA=ON_CUDA,
        )  # fmt: skip
    else:
        # k_pe is stored last, so that its loads do not keep those of kv_a waiting behind a store
        row = first_row + tl.arange(0, ROWS)[:, None]
        mask = row < m
        position = positions(position_ptr, row, mask)
        k_pe = x_ptr + Q + C + row_offset(row, stride_xm, STRIDE_UNIT)
        a, b = load_pairs(
            k_pe, mask, row_offset(m, stride_xm, STRIDE_UNIT), PARTIAL=PARTIAL, R=R, R_BLOCK=R_BLOCK, ROWS=ROWS,
            HALVES=ROPE == "half", ON_CUDA=ON_CUDA,
        )  # fmt: skip
        cos = load_angles(cos_ptr, position, stride_cos, mask, R=R, R_BLOCK=R_BLOCK, ANGLE_UNIT=ANGLE_UNIT)
        sin = load_angles(sin_ptr, position, stride_sin, mask, R=R, R_BLOCK=R_BLOCK, ANGLE_UNIT=ANGLE_UNIT)
        u, v = rotate(a, b, cos, sin, SPEC, row_dtype(PARTIAL, x_ptr.dtype.element_ty))
        norm_quant_rows(
            x_ptr=x_ptr + Q, residual_ptr=None, weight_ptr=kv_weight_ptr, data_ptr=kv_data_ptr, scale_ptr=kv_scale_ptr,
            sum_ptr=None, norm_ptr=kv_norm_ptr, stride_xm=stride_xm, stride_rm=0, first_row=first_row, part=0, m=m,
            scale_rows=scale_rows, eps=eps, mailbox=None, weight_offset=0.0, K=C, SPEC=SPEC, PARTIAL=PARTIAL,
            ROWS=ROWS, CLUSTER=1, TILES=C_TILES, OWN=C_TILES, LOG_WARPS=LOG_C_WARPS, LATE_WEIGHT=LATE_WEIGHT,
            EVICT_FIRST=EVICT_FIRST, KEEP_SUM=False, STRIDE_UNIT=STRIDE_UNIT, PDL=PDL, ON_CUDA=ON_CUDA,
        )  # fmt: skip
        out_ptr = k_pe_ptr + row.to(tl.int64) * R
        store_pairs(out_ptr, u, v, mask, R=R, R_BLOCK=R_BLOCK, ROWS=ROWS, HALVES=ROPE != "interleaved")


def plan_latent_norm_quant(
    x: torch.Tensor | PartialRows,
    q_weight: torch.Tensor,
    kv_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    eps: float,
    rope: str,
    spec: QuantSpec,
    quantize_kv: bool = False,
    config: Config | None = None,
) -> Plan:
    """The launch of `latent_norm_quant` on checked inputs like these."""
    m, q, c = x.shape[0], q_weight.shape[0], kv_weight.shape[0]
    r = x.shape[1] - q - c
    spec = spec.at(m)
    where = target(x.device)
    config = config or choose_config("latent_norm_quant", q, m, where.capability, isinstance(x, PartialRows))
    q_row, c_row = divided(q, spec, config), divided(c, spec, unsplit(config))
    unit, angle_unit = stride_unit(x), stride_unit(cos, sin)
    strides = x.stride(0) // unit, cos.stride(0) // angle_unit, sin.stride(0) // angle_unit
    kv_quantized = quantized(m, c, spec) if quantize_kv else (None, None)
    return plan(
        latent_norm_quant_kernel,
        grid=(-(-m // config.rows) * (q_row.programs + 1), 1, 1),
        inputs=(x, q_weight, kv_weight, cos, sin, positions),
        outputs=(*quantized(m, q, spec), matrix(m, c, x.dtype), matrix(m, r, x.dtype), *kv_quantized),
        numbers=(m, *strides, spec.scale_rows(m), eps),
        where=where,
        config=config,
        Q=q,
        C=c,
        R=r,
        ROPE=rope,
        SPEC=kernel_spec(spec),
        PARTIAL=partial(x),
        PARTS=q_row.programs + 1,
        ROWS=config.rows,
        Q_TILES=q_row.tiles,
        Q_OWN=q_row.own,
        LOG_Q_WARPS=q_row.log_warps,
        C_TILES=c_row.tiles,
        LOG_C_WARPS=c_row.log_warps,
        R_BLOCK=power_of_two(r // 2),
        LATE_WEIGHT=config.late_weight,
        EVICT_FIRST=config.evict_first,
        STRIDE_UNIT=unit,
        ANGLE_UNIT=angle_unit,
        PDL=where.release(config),
        ON_CUDA=where.on_cuda,
    )


def latent_norm_quant(
    x: torch.Tensor,
    q_weight: torch.Tensor,
    kv_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    eps: float,
    rope: str,
    spec: QuantSpec,
    quantize_kv: bool = False,
    config: Config | None = None,
) -> Outputs:
    """Launch on checked inputs: -> q data, q scale, kv norm, k_pe, kv data, kv scale (these two None unless asked)."""
    inputs = x, q_weight, kv_weight, cos, sin, positions
    return launch(plan_latent_norm_quant(*inputs, eps, rope, spec, quantize_kv, config), *inputs)
