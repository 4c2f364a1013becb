"""Stand-ins for vLLM's fused CUDA ops and linear ops: their names, schemas and arithmetic in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from normquant.vllm import fp8_linear

SCALE_STRIDES: list[tuple[int, ...]] = []  # of the scales that the linear op was given

_C = torch.library.Library("_C", "FRAGMENT")
_VLLM = torch.library.Library("vllm", "FRAGMENT")
_C.define(
    "rms_norm_per_block_quant(Tensor(a!) result, Tensor input, Tensor weight, Tensor(b!) scale, float epsilon, "
    "Tensor? scale_ub, Tensor(c!)? residual, int group_size, bool is_scale_transposed) -> ()"
)
_C.define(
    "silu_and_mul_per_block_quant(Tensor(a!) out, Tensor input, Tensor(b!) scales, int group_size, "
    "Tensor? scale_ub=None, bool is_scale_transposed=False) -> ()"
)
_C.define("cutlass_scaled_mm(Tensor(a!) out, Tensor a, Tensor b, Tensor a_scales, Tensor b_scales, Tensor? bias) -> ()")
_VLLM.define(
    "fp8_gemm_nt_op(Tensor q_input, Tensor input_scale, Tensor weight, Tensor weight_scale, Tensor(a!) output, "
    "bool use_deep_gemm_e8m0) -> ()"
)


def _quantize(y: torch.Tensor, group: int, data: torch.Tensor, scale: torch.Tensor) -> None:
    grouped = y.unflatten(-1, (-1, group))  # [M, G, group] fp32
    s = torch.clamp(grouped.abs().amax(-1) / torch.full((), 448.0), min=1.0 / (448.0 * 512.0))
    data.copy_((grouped / s.unsqueeze(-1)).clamp(-448.0, 448.0).flatten(-2).to(data.dtype))
    scale.copy_(s)


@torch.library.impl(_C, "rms_norm_per_block_quant", "CPU")
def _norm(result, input, weight, scale, epsilon, scale_ub, residual, group_size, is_scale_transposed) -> None:
    h = input.float()
    if residual is not None:
        h = h + residual.float()
        residual.copy_(h)
    n = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + epsilon)).to(input.dtype)
    _quantize((n * weight).float().flatten(0, -2), group_size, result.view(-1, result.shape[-1]), scale)


@torch.library.impl(_C, "silu_and_mul_per_block_quant", "CPU")
def _silu(out, input, scales, group_size, scale_ub=None, is_scale_transposed=False) -> None:
    gate, up = input.float().chunk(2, dim=-1)
    _quantize(gate / (1.0 + torch.exp(-gate)) * up, group_size, out, scales)


@torch.library.impl(_VLLM, "fp8_gemm_nt_op", "CPU")
def _gemm(q_input, input_scale, weight, weight_scale, output, use_deep_gemm_e8m0) -> None:
    SCALE_STRIDES.append(input_scale.stride())
    output.copy_(_product(q_input, input_scale, weight, weight_scale))


@torch.library.impl(_C, "cutlass_scaled_mm", "CPU")
def _cutlass(out, a, b, a_scales, b_scales, bias) -> None:
    assert b.stride(0) == 1 and a_scales.stride() == (1, len(a)) and b_scales.t().is_contiguous()
    y = _product(a, a_scales, b.t(), b_scales.t(), torch.float32)
    out.copy_(y if bias is None else y + bias)


# vLLM's default linears on Hopper quantize inside, by other rules for few rows than for many; see `normquant.specs`.
_VLLM.define("flashinfer_fp8_blockscale_gemm(Tensor input, Tensor weight, Tensor weight_scale) -> Tensor")
_VLLM.define(
    "dynamic_flashinfer_deepgemm_blockscale_gemm(Tensor input, Tensor weight, Tensor weight_scale, int group_size, "
    "bool use_deep_gemm_e8m0) -> Tensor"
)


@torch.library.impl(_VLLM, "flashinfer_fp8_blockscale_gemm", "CPU")
def _flashinfer(input, weight, weight_scale) -> torch.Tensor:
    amax = input.float().unflatten(-1, (-1, 128)).abs().amax(-1, keepdim=True)
    factor = torch.where(amax == 0, 1.0, amax.reciprocal() * 448.0)
    data = (input.float().unflatten(-1, (-1, 128)) * factor).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    return _product(data.flatten(-2), factor.reciprocal().squeeze(-1), weight, weight_scale)


@torch.library.impl(_VLLM, "dynamic_flashinfer_deepgemm_blockscale_gemm", "CPU")
def _flashinfer_or_deepgemm(input, weight, weight_scale, group_size, use_deep_gemm_e8m0) -> torch.Tensor:
    if input.shape[0] < 32:
        return _flashinfer(input, weight, weight_scale)
    grouped = input.float().unflatten(-1, (-1, group_size))
    scale = grouped.abs().amax(-1).clamp(min=1e-10) / torch.full((), 448.0)
    if use_deep_gemm_e8m0:
        scale = torch.exp2(scale.clamp(min=1e-10).double().log2().ceil()).float()
    data = (grouped / scale.unsqueeze(-1)).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    return _product(data.flatten(-2), scale, weight, weight_scale)


@torch.library.impl(fp8_linear.LIBRARY, "block_fp8_linear", "CPU")
def _quantized_linear(data, scale, weight, weight_scale, flashinfer_below, e8m0) -> torch.Tensor:
    assert scale.stride() == (1, max(1, (len(data) + 3) // 4 * 4)), "the kernels read scales in TMA-aligned columns"
    assert len(data) < flashinfer_below or not e8m0 or (scale.view(torch.int32) & 0x7FFFFF == 0).all()
    return _product(data, scale, weight, weight_scale)


torch.library.impl(fp8_linear.LIBRARY, "cutlass_block_fp8_linear", "CPU")(fp8_linear.cutlass_block_fp8_linear)


def _product(data, scale, weight, weight_scale, dtype=torch.bfloat16) -> torch.Tensor:
    x = data.float() * scale.repeat_interleave(128, -1)
    w = weight.float() * weight_scale.repeat_interleave(128, 0)[: len(weight)].repeat_interleave(128, 1)
    return F.linear(x, w).to(dtype)


def _fake_product(input, weight, *args) -> torch.Tensor:
    return input.new_empty((input.shape[0], weight.shape[0]), dtype=torch.bfloat16)


for _name in ("flashinfer_fp8_blockscale_gemm", "dynamic_flashinfer_deepgemm_blockscale_gemm"):
    torch.library.register_fake(f"vllm::{_name}", _fake_product, lib=_VLLM)

for _name in (
    *("_C::rms_norm_per_block_quant", "_C::silu_and_mul_per_block_quant", "_C::cutlass_scaled_mm"),
    "vllm::fp8_gemm_nt_op",
):
    torch.library.register_fake(_name, lambda *args, **kwargs: None, lib=_C if _name.startswith("_C") else _VLLM)


def _outputs(m: int, k: int, group: int, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    data = torch.empty((m, k), dtype=torch.float8_e4m3fn)
    if layout == "row":
        return data, torch.empty((m, k // group))
    if layout == "col":
        return data, torch.empty((k // group, m)).permute(-1, -2)
    return data, torch.empty_strided((m, k // group), (1, (m + 3) // 4 * 4))


def rms_norm_per_block_quant(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None = None,
    *,
    group: int = 128,
    layout: str = "row",
    eps: float = 1e-6,
    bound: torch.Tensor | None = None,
    transposed: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The op on outputs that are allocated for it; residual is changed."""
    data, scale = _outputs(x.numel() // x.shape[-1], x.shape[-1], group, layout)
    columns = layout != "row" if transposed is None else transposed
    result = data.view(x.shape)
    torch.ops._C.rms_norm_per_block_quant(result, x, weight, scale, eps, bound, residual, group, columns)
    return result, scale


def silu_and_mul_per_block_quant(
    x: torch.Tensor, *, group: int = 128, layout: str = "row"
) -> tuple[torch.Tensor, torch.Tensor]:
    """The op on outputs that are allocated for it."""
    data, scale = _outputs(x.shape[0], x.shape[1] // 2, group, layout)
    torch.ops._C.silu_and_mul_per_block_quant(data, x, scale, group, None, layout != "row")
    return data, scale


def deepgemm(
    data: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None = None,
    *,
    ue8m0: bool = False,
) -> torch.Tensor:
    """The linear op; weight [N, K], with scales of one where none are given."""
    n, k = weight.shape
    weight_scale = torch.ones(-(-n // 128), -(-k // 128)) if weight_scale is None else weight_scale
    output = torch.empty((data.shape[0], n), dtype=torch.bfloat16)
    torch.ops.vllm.fp8_gemm_nt_op(data, scale, weight, weight_scale, output, ue8m0)
    return output


def cutlass(
    data: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    dtype: torch.dtype = torch.bfloat16,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The op on an output that is allocated for it; weight [N, K], weight_scale [N/128, K/128]."""
    out = torch.empty((data.shape[0], weight.shape[0]), dtype=dtype)
    torch.ops._C.cutlass_scaled_mm(out, data, weight.t(), scale, weight_scale.t(), bias)
    return out
