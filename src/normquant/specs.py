"""The block quantizations that serving stacks use today, each as its source computes it.

s is the stored scale, y the normed value, q the fp8 value; every rule accumulates in fp32.
"""

from __future__ import annotations

from normquant.spec import QuantSpec

HF = QuantSpec(rounding="twice", sum="rounded")
"""transformers' and DeepSeek's eager norm followed by a 1x128 quantization: y = round(round(x * rstd) * w) over the
rounded residual sum, amax floor 1e-10, s = amax / 448, q = y / s."""

FLASHINFER = QuantSpec(layout="col_tma", rounding="once", floor=1e-4, scale_by="divide", divide="fast_amax")
"""`flashinfer.norm.fused_add_rmsnorm_fp8_block_quant`: norm of the unrounded sum, y = round(x * rstd * w),
amax = max(amax, 1e-4), s = amax / 448, q = y * (448 * (1 / amax)), built with fast math, whose reciprocal is
approximate. The sum of squares is added up in another order, which moves some 3e-7 of the values."""

FLASHINFER_LINEAR = QuantSpec(layout="col_tma", rounding="twice", floor=0.0, scale_by="divide", divide="fast_factor")
"""What `flashinfer.gemm.fp8_blockscale_gemm_sm90` does inside with a bf16 input: amax without a floor and without NaN,
f = 448 * (1 / amax), as fast math divides, or 1 for a group of zeros, q = y * f, s = 1 / f. The norm is vLLM's, y =
round(round(x * rstd) * w); `fp8_quantize_1x128` of the same package gives these bits for every bf16 input."""

VLLM = QuantSpec(rounding="twice", scale_by="divide")
"""vLLM's norm as a compiled model has it, followed by `per_token_group_fp8_quant`: norm of the unrounded sum,
y = round(round(x * rstd) * w), amax = max(amax, 1e-10), s = amax / 448, q = y / s. Of a group with a NaN everything is
NaN here; vLLM leaves the NaN out of amax, and its clamp makes it -448."""

VLLM_OPS = VLLM.replace(rounding="once", sum="rounded")
"""vLLM's CUDA ops `rms_norm` or `fused_add_rms_norm` followed by `per_token_group_fp8_quant`: the residual is added in
the activation dtype and the norm rounded once, y = round(x * rstd * w). `silu_and_mul` rounds twice, as VLLM does."""

VLLM_UE8M0 = VLLM.replace(scale="ue8m0", scale_floor=1e-10, nan="ignore")
"""`per_token_group_fp8_quant(scale_ue8m0=True)`: s = 2**ceil(log2(max(amax / 448, 1e-10))), amax without NaN, so that
every scale is a power of two, or inf beside an inf. The NaN itself stays NaN here, and becomes -448 there."""

VLLM_FUSED = VLLM.replace(floor=0.0, scale_floor=1.0 / (448.0 * 512.0))
"""`rms_norm_per_block_quant`: as VLLM with s = max(amax / 448, 1 / (448 * 512))."""

VLLM_FUSED_SILU = VLLM_FUSED.replace(rounding="none")
"""`silu_and_mul_per_block_quant`: the same, the gated product never rounded."""

VLLM_PR_37960 = VLLM.replace(rounding="none", layout="col")
"""The Triton kernel of vLLM PR #37960: fp32 throughout, y is never rounded; column-major scales."""

AITER = QuantSpec(rounding="none", scale_by="divide", divide="reciprocal")
"""AITER's Triton kernel: fp32 throughout, amax floor 1e-10, s = amax / 448, q = y * (1 / s)."""

DEEPGEMM = QuantSpec(layout="col_tma", floor=1e-4, scale_by="divide", divide="reciprocal")
"""DeepGEMM's `per_token_cast_to_fp8`: amax clamped at 1e-4, s = amax / 448, q = y * (1 / s)."""

DEEPGEMM_UE8M0 = DEEPGEMM.replace(scale="ue8m0")
"""The same with s rounded up to a power of two, stored as fp32 (Hopper): 2**127 at most, which is also the scale of a
group with a NaN or an inf. With a NaN all data of the group is NaN here; there the numbers beside it become zeros."""

DEEPGEMM_PACKED = DEEPGEMM.replace(scale="ue8m0_packed")
"""The same with four exponents in an int32 (Blackwell)."""

TILE_KERNELS = DEEPGEMM.replace(rounding="none", layout="row", divide="factor")
"""`cast` of DeepSeek's TileKernels, alone or after its `swiglu_forward`, which never rounds: amax clamped at 1e-4,
s = amax / 448, q = y * (448 / amax), both quotients correctly rounded. Its powers of two (`round_sf`) are those of
DEEPGEMM_UE8M0 and DEEPGEMM_PACKED, but for groups with a NaN."""

SGLANG = QuantSpec(rounding="once", scale_by="multiply", divide="amax")
"""SGLang's `per_token_group_quant_fp8` on Hopper: amax floor 1e-10, s = amax * (1 / 448),
q = y * (448 * (1 / amax))."""

HELION = VLLM.replace(scale_by="multiply")
"""Helion's example kernel: as VLLM with s = amax * (1 / 448)."""
