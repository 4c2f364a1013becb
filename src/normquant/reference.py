"""The definition of right: every op in eager torch, fp32, on any device.

A kernel that disagrees with a function here is wrong. On CPU these functions are also what the ops run.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from normquant.approximate_reciprocal import approximate_reciprocal, flush, flushed_factor
from normquant.spec import AMAX_SHIFT, FP8_MAX, MAX_POWER, QuantSpec, Rope, empty_scale


def sum_of_squares(h: torch.Tensor) -> torch.Tensor:
    """Sum of h*h over the last dimension, [..., K] fp32 -> [..., 1] fp32, in one fixed order.

    The order is a binary tree over neighbouring pairs of the row, padded with zeros to a power of two. It depends on
    nothing but K, so a row has one result whatever kernel, group or split computes it.
    """
    tree = h * h
    tree = F.pad(tree, (0, (1 << (tree.shape[-1] - 1).bit_length()) - tree.shape[-1]))
    while tree.shape[-1] > 1:
        tree = tree[..., 0::2] + tree[..., 1::2]
    return tree


def rms_norm(
    h: torch.Tensor, weight: torch.Tensor, eps: float, spec: QuantSpec, dtype: torch.dtype, weight_offset: float = 0.0
) -> torch.Tensor:
    """h / sqrt(mean(h**2) + eps) * (weight + weight_offset), [M, K] fp32 -> [M, K] fp32.

    Rounded to `dtype` where `spec.rounding` says (Zhang and Sennrich 2019, equation 4).
    """
    rstd = torch.rsqrt(sum_of_squares(h) / h.shape[-1] + eps)  # [M, 1]
    return scale_by_weight(h * rstd, weight, spec, dtype, weight_offset)


def scale_by_weight(
    n: torch.Tensor, weight: torch.Tensor, spec: QuantSpec, dtype: torch.dtype, weight_offset: float = 0.0
) -> torch.Tensor:
    """n * (weight + weight_offset) in fp32 with the roundings of `spec`; n is [M, K] fp32, weight [K] or [M, K]."""
    w = weight.float() + weight_offset if weight_offset else weight.float()
    if spec.rounding in ("inner", "twice"):
        n = n.to(dtype).float()
    y = n * w
    return y.to(dtype).float() if spec.rounding in ("once", "twice") else y


def group_scale(amax: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """amax of each group -> its scale as fp32, any shape; powers of two for ue8m0."""
    if spec.scale_by == "scalar":
        scale = amax / FP8_MAX
    elif spec.scale_by == "multiply":
        scale = amax * (1.0 / FP8_MAX)
    else:
        scale = amax / torch.full_like(amax, FP8_MAX)  # a tensor: torch's CUDA kernels then divide truly
    if spec.scale_floor:
        scale = scale.clamp(min=spec.scale_floor)
    return round_up_to_power_of_two(scale) if spec.is_ue8m0 else scale


def round_up_to_power_of_two(s: torch.Tensor) -> torch.Tensor:
    """2**ceil(log2(s)) for positive normal fp32 s, exactly; inf and NaN stay."""
    bits = s.view(torch.int32)
    up = ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return torch.where(s.isfinite(), up, s)


def quantize(y: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """y [M, K] fp32 -> data [M, K] fp8, scales [M, K/group] fp32 (before packing and layout).

    NaN in a group gives a NaN scale and NaN data, or is left out of amax, as `spec.nan` says, and stays NaN. inf gives
    an inf scale, NaN where y is inf and zero elsewhere. Where a power of two would be NaN, and in the same specs where
    it would be inf, the scale is 2**127 instead, and the data as it was.
    """
    spec = spec.at(y.shape[0])
    grouped = y.unflatten(-1, (-1, spec.group))  # [M, G, group]
    if spec.divide == "fast_factor":
        return _quantize_by_factor(grouped, spec)
    amax = _amax(grouped, ignore_nan=spec.nan == "ignore")  # [M, G]
    if spec.floor:
        amax = amax.clamp(min=spec.floor)
    scale = group_scale(amax, spec)
    q = _divided(grouped, scale.unsqueeze(-1), amax.unsqueeze(-1), spec)
    if spec.is_ue8m0 and spec.nan == "propagate":
        scale = torch.where(scale.isfinite(), scale, MAX_POWER)
    return q.clamp(-FP8_MAX, FP8_MAX).to(spec.dtype).flatten(-2), scale


def _amax(grouped: torch.Tensor, ignore_nan: bool) -> torch.Tensor:
    """The largest magnitude of each group: [M, G, group] -> [M, G]. A group of nothing but NaN has 0, or NaN."""
    magnitude = grouped.abs()
    return (magnitude.nan_to_num(0.0, posinf=float("inf")) if ignore_nan else magnitude).amax(-1)


def _divided(y: torch.Tensor, scale: torch.Tensor, amax: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """y by its scale in the way that `spec.divide` names; y [M, G, group], scale and amax [M, G, 1]."""
    if spec.divide == "scale":
        return y / scale
    if spec.divide == "reciprocal":
        return y * scale.reciprocal()
    if spec.divide == "factor":
        return y * (torch.full_like(amax, FP8_MAX) / amax)  # a tensor, as in group_scale
    fast = spec.divide == "fast_amax" and amax.is_cuda
    inverse = (approximate_reciprocal if fast else torch.reciprocal)(amax * AMAX_SHIFT)
    return y * (inverse * (FP8_MAX * AMAX_SHIFT))


def _quantize_by_factor(grouped: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """The rule `fast_factor`: grouped [M, G, group] fp32 -> data [M, K] fp8, scales [M, G] fp32.

    NaN stays NaN and counts as nothing in amax. An inf gives an inf scale, NaN where it is and zero elsewhere.
    """
    amax = _amax(grouped, ignore_nan=True)
    if amax.is_cuda:
        factor, scale = flushed_factor(amax)
        grouped = flush(grouped)
    else:
        factor = amax.reciprocal() * FP8_MAX
        scale = factor.reciprocal()
    zeros = amax == 0
    q = grouped * torch.where(zeros, 1.0, factor).unsqueeze(-1)
    return q.clamp(-FP8_MAX, FP8_MAX).to(spec.dtype).flatten(-2), torch.where(zeros, 1.0, scale)


def store_scale(scale: torch.Tensor, k: int, spec: QuantSpec) -> torch.Tensor:
    """Scales [M, G] fp32 in the encoding, shape and stride of `spec`, TMA padding zeroed."""
    groups = scale.shape[1]
    if spec.scale == "ue8m0_packed":
        exponents = F.pad((scale.view(torch.int32) >> 23) & 0xFF, (0, -groups % 4)).unflatten(-1, (-1, 4))
        shifts = torch.arange(0, 32, 8, device=scale.device, dtype=torch.int32)
        scale = (exponents << shifts).sum(-1, dtype=torch.int32)  # [M, ceil(G/4)]
    return lay_out_scale(scale, k, spec)


def lay_out_scale(scale: torch.Tensor, k: int, spec: QuantSpec) -> torch.Tensor:
    """Encoded scales [M, G or ceil(G/4)], in rows, in the stride of `spec`, TMA padding zeroed."""
    out = empty_scale(scale.shape[0], k, spec, scale.device)
    if spec.layout == "col_tma":
        out.as_strided((spec.scale_rows(scale.shape[0]), out.shape[1]), out.stride()).zero_()
    return out.copy_(scale)


def rms_norm_quant(
    x: torch.Tensor, weight: torch.Tensor, eps: float, spec: QuantSpec, weight_offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [M, K], weight [K] -> data [M, K] fp8, scale, norm [M, K] in x's dtype."""
    y = rms_norm(x.float(), weight, eps, spec, x.dtype, weight_offset)
    return *group_quant(y, spec), y.to(x.dtype)


def add_rms_norm_quant(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    spec: QuantSpec,
    weight_offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, residual [M, K], weight [K] -> data, scale, x + residual [M, K] in x's dtype, norm [M, K] in x's dtype."""
    h = x.float() + residual.float()
    stored = h.to(x.dtype)
    y = rms_norm(stored.float() if spec.sum == "rounded" else h, weight, eps, spec, x.dtype, weight_offset)
    return *group_quant(y, spec), stored, y.to(x.dtype)


def sum_of_parts(parts: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """parts [P, M, K] -> their sum [M, K]: in their order in fp32, rounded once to `dtype`, or the parts' own.

    They are those of the ranks of a group, or of a product that was split over K.
    """
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(dtype or parts.dtype)


def block_fp8_linear(
    data: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, blocks: int
) -> torch.Tensor:
    """data [M, K] fp8, scale [M, K/128], weight [N, K] fp8, weight_scale [ceil(N/128), K/128] -> [P, M, N] fp32.

    Partial sums of the product, each over `blocks` blocks of 128 values of K, the last over what is left. The dot of a
    block is exact, and rounded once; it is multiplied with the product of both scales and added in one rounding.
    """
    a, w = (t.double().unflatten(1, (-1, 128)) for t in (data, weight))  # which holds a block's dot exactly
    parts = []
    for block in range(a.shape[1]):
        if block % blocks == 0:
            parts.append(torch.zeros(data.shape[0], weight.shape[0], device=data.device))
        dot = (a[:, block] @ w[:, block].t()).float()
        by_column = weight_scale[:, block].repeat_interleave(128)[: weight.shape[0]]
        scales = scale[:, block, None] * by_column  # [M, N]
        parts[-1] = (dot.double() * scales.double() + parts[-1].double()).float()
    return torch.stack(parts)


def all_reduce_norm(
    parts: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    spec: QuantSpec,
    weight_offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """parts [ranks, M, K], residual [M, K], weight [K] -> sum [M, K] in the parts' dtype, norm [M, K] fp32.

    The sum is that of the parts, plus the residual where there is one.
    """
    h = sum_of_parts(parts).float()
    if residual is not None:
        h = h + residual.float()
    stored = h.to(parts.dtype)
    return stored, rms_norm(
        stored.float() if spec.sum == "rounded" else h, weight, eps, spec, parts.dtype, weight_offset
    )


def all_reduce_add_rms_norm_quant(
    parts: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    spec: QuantSpec,
    weight_offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same -> data [M, K] fp8, scale, sum and norm [M, K] in the parts' dtype."""
    stored, y = all_reduce_norm(parts, residual, weight, eps, spec, weight_offset)
    return *group_quant(y, spec), stored, y.to(parts.dtype)


def group_quant(x: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] -> data [M, K] fp8, scale."""
    data, scale = quantize(x.float(), spec)
    return data, store_scale(scale, x.shape[-1], spec)


def silu_mul_quant(
    x: torch.Tensor, spec: QuantSpec, limit: float | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [M, 2K], gate then up -> data [M, K] fp8 of silu(gate) * up, scale, that product [M, K] in x's dtype.

    With a limit, gate is at most that and up within plus and minus that, in x's dtype; NaN stays NaN.
    """
    gate, up = x.chunk(2, dim=-1)  # [M, K] each
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    y = scale_by_weight(silu(gate.float()), up, spec, x.dtype)
    return *group_quant(y, spec), y.to(x.dtype)


def silu(g: torch.Tensor) -> torch.Tensor:
    """g / (1 + exp(-g)) in fp32, any shape."""
    return g / (1.0 + torch.exp(-g))


def gated_norm_quant(
    x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float, spec: QuantSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, z [M, H * D], weight [D] -> data [M, H * D] fp8 of the norm of each head times silu(z), scale.

    The norm is rounded as `spec.rounding` says, and what is quantized to x's dtype in any case.
    """
    heads = x.float().unflatten(1, (-1, weight.shape[0]))  # [M, H, D]
    n = rms_norm(heads, weight, eps, spec, x.dtype).flatten(1)
    return group_quant((n * silu(z.float())).to(x.dtype), spec)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rope: Rope, spec: QuantSpec) -> torch.Tensor:
    """x [..., R] rotated by the angles of cos and sin [..., R/2], in x's dtype (Su et al. 2021, equation 34)."""
    pairs = x.float().unflatten(-1, (2, -1) if rope == "half" else (-1, 2))
    a, b = pairs.unbind(-2 if rope == "half" else -1)  # [..., R/2] each

    def product(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        p = u * v.float()
        return p.to(x.dtype).float() if spec.rounding in ("inner", "twice") else p

    rotated = product(a, cos) - product(b, sin), product(b, cos) + product(a, sin)
    return torch.stack(rotated, -1 if rope == "interleaved" else -2).flatten(-2).to(x.dtype)


def rope_last(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    heads: int,
    r: int,
    rope: Rope,
    spec: QuantSpec,
) -> torch.Tensor:
    """x [M, H * D] -> the same, the last r of the D values of each head rotated."""
    at = slice(0, x.shape[0]) if positions is None else positions
    cos, sin = (t[at, : r // 2].unsqueeze(1) for t in (cos, sin))  # [M, 1, R/2] each
    parts = x.unflatten(1, (heads, -1))  # [M, H, D]
    copied, last = parts.split((parts.shape[-1] - r, r), dim=-1)
    return torch.cat((copied, rotate(last, cos, sin, rope, spec)), dim=-1).flatten(1)


def latent_norm_quant(
    x: torch.Tensor,
    q_weight: torch.Tensor,
    kv_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    eps: float,
    rope: Rope,
    spec: QuantSpec,
) -> tuple[torch.Tensor, ...]:
    """x [M, Q + C + R] -> q data, q scale, kv norm [M, C], k_pe [M, R], kv data, kv scale."""
    m, q, c = x.shape[0], q_weight.shape[0], kv_weight.shape[0]
    q_a, kv_a, k_pe = x.split((q, c, x.shape[1] - q - c), dim=1)
    half = k_pe.shape[1] // 2
    at = slice(0, m) if positions is None else positions
    q_data, q_scale, _ = rms_norm_quant(q_a, q_weight, eps, spec)
    kv_data, kv_scale, kv_norm = rms_norm_quant(kv_a, kv_weight, eps, spec)
    return q_data, q_scale, kv_norm, rotate(k_pe, cos[at, :half], sin[at, :half], rope, spec), kv_data, kv_scale
