"""The latents of multi-head latent attention, from the fused qkv_a projection, in one launch.

A row of the projection is [q_a | kv_a | k_pe], 1536 + 512 + 64 values for DeepSeek-R1:

    q_a   RMSNorm, quantized in groups               -> what q_b_proj reads
    kv_a  RMSNorm in the activation dtype            -> what the kv cache holds
          and, if asked for, quantized in groups     -> what kv_b_proj reads
    k_pe  rotary position embedding                  -> what the kv cache holds beside kv_a

Bytes moved per row in bf16, with Q, C and R the three widths, group 128, fp32 scales: read 2(Q + C + R) and 2R of cos
and sin; written Q + Q/32 + 2C + 2R, and C + C/32 more with quantized kv_a.

Grid: M / rows * PARTS. The last of the PARTS programs of a row does kv_a and k_pe, the others share q_a as in
`rms_norm_quant`. They are neighbours in the grid, so that a row, which lies in one piece, is read at one time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from normquant.kernels._device import row_offset, wait_for_predecessor
from normquant.kernels._rope import load_angles, load_pairs, positions, store_pairs, turn
from normquant.kernels._rows import norm_quant_rows
from normquant.kernels.capability import target
from normquant.kernels.configs import Config
from normquant.kernels.configs import config as choose_config
from normquant.kernels.launch import Launcher, Plan, matrix, plan, quantized
from normquant.kernels.powers_of_two import power_of_two
from normquant.kernels.spec_constant import constant
from normquant.kernels.tiling import divided, stride_unit, unsplit
from normquant.spec import QuantSpec


@triton.jit(do_not_specialize=["m", "stride_xm", "stride_cos", "stride_sin", "scale_rows", "eps"])
def latent_norm_quant_kernel(
    x_ptr,  # [M, Q + C + R] bf16 or fp16, any row stride
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
            x_ptr, None, q_weight_ptr, q_data_ptr, q_scale_ptr, None, None, stride_xm, 0, first_row, part, m,
            scale_rows, eps, None, 0.0, Q, SPEC, ROWS, 1, Q_TILES, Q_OWN, LOG_Q_WARPS, LATE_WEIGHT, EVICT_FIRST,
            False, STRIDE_UNIT, PDL, ON_CUDA,
        )  # fmt: skip
    else:
        # k_pe is stored last, so that its loads do not keep those of kv_a waiting behind a store
        row = first_row + tl.arange(0, ROWS)[:, None]
        there = row < m
        position = positions(position_ptr, row, there)
        k_pe = x_ptr + Q + C + row_offset(row, stride_xm, STRIDE_UNIT)
        a, b = load_pairs(k_pe, there, R, R_BLOCK, ROWS, ROPE == "half")
        cos = load_angles(cos_ptr, position, stride_cos, there, R, R_BLOCK, ANGLE_UNIT)
        sin = load_angles(sin_ptr, position, stride_sin, there, R, R_BLOCK, ANGLE_UNIT)
        u, v = turn(a, b, cos, sin, SPEC)
        norm_quant_rows(
            x_ptr + Q, None, kv_weight_ptr, kv_data_ptr, kv_scale_ptr, None, kv_norm_ptr, stride_xm, 0, first_row, 0, m,
            scale_rows, eps, None, 0.0, C, SPEC, ROWS, 1, C_TILES, C_TILES, LOG_C_WARPS, LATE_WEIGHT, EVICT_FIRST,
            False, STRIDE_UNIT, PDL, ON_CUDA,
        )  # fmt: skip
        store_pairs(k_pe_ptr + row.to(tl.int64) * R, u, v, there, R, R_BLOCK, ROWS, ROPE != "interleaved")


@Launcher
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
) -> Plan:
    """For checked inputs: -> q data, q scale, kv norm, k_pe, kv data, kv scale (these two None unless asked)."""
    m, q, c = x.shape[0], q_weight.shape[0], kv_weight.shape[0]
    r = x.shape[1] - q - c
    spec = spec.at(m)
    where = target(x.device)
    config = config or choose_config("latent_norm_quant", q, m, where.capability)
    q_row, c_row = divided(q, spec, config), divided(c, spec, unsplit(config))
    unit, angle_unit = stride_unit(x), stride_unit(cos, sin)
    return plan(
        latent_norm_quant_kernel,
        (-(-m // config.rows) * (q_row.programs + 1), 1, 1),
        (x, q_weight, kv_weight, cos, sin, positions),
        (
            *quantized(m, q, spec),
            matrix(m, c, x.dtype),
            matrix(m, r, x.dtype),
            *(quantized(m, c, spec) if quantize_kv else (None, None)),
        ),
        (
            m,
            x.stride(0) // unit,
            cos.stride(0) // angle_unit,
            sin.stride(0) // angle_unit,
            spec.scale_rows(m),
            eps,
        ),
        where,
        config,
        Q=q,
        C=c,
        R=r,
        ROPE=rope,
        SPEC=constant(spec),
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
