"""normquant's functions with vLLM's `QuantizedActivation`, for eager mode and for models that vLLM does not compile.

    spec = vllm_manual.input_spec(layer.qkv_proj)                       # how that layer wants its input, read off it
    q, residual = vllm_manual.add_rms_norm_quant(x, residual, norm.weight, eps, spec=spec)
    qkv = vllm_manual.block_linear(layer.qkv_proj, q)                   # the layer's own kernel, on what is quantized

Importing this module imports vLLM. Shapes, dtypes and errors are those of the functions of the same names in
`normquant`.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.fusion.quant_activation import QuantizedActivation
from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8Dynamic64Sym, kFp8Dynamic128Sym

from normquant import ops
from normquant.spec import QuantSpec
from normquant.specs import VLLM
from normquant.vllm.linear_inputs import block_scale, kernel_of, quantization_of

__all__ = ["add_rms_norm_quant", "block_linear", "group_quant", "input_spec", "rms_norm_quant", "silu_mul_quant"]

KEYS = {128: kFp8Dynamic128Sym, 64: kFp8Dynamic64Sym}


def rms_norm_quant(x: torch.Tensor, weight: torch.Tensor, eps: float, *, spec: QuantSpec = VLLM) -> QuantizedActivation:
    """RMSNorm of x [..., K], quantized. `spec.group` must be 128 or 64, for which vLLM has a key."""
    return _to_vllm(ops.rms_norm_quant(x, weight, eps, spec=spec), x.dtype)


def add_rms_norm_quant(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *, spec: QuantSpec = VLLM
) -> tuple[QuantizedActivation, torch.Tensor]:
    """RMSNorm of x + residual, quantized, and the sum [..., K] in x's dtype."""
    quantized, total, *_ = ops.add_rms_norm_quant(x, residual, weight, eps, spec=spec)
    return _to_vllm(quantized, x.dtype), total


def silu_mul_quant(x: torch.Tensor, *, spec: QuantSpec = VLLM, limit: float | None = None) -> QuantizedActivation:
    """silu(gate) * up of x [..., 2K], gate first, quantized. limit: of gate and up, vLLM's `swiglu_limit`."""
    return _to_vllm(ops.silu_mul_quant(x, spec=spec, limit=limit), x.dtype)


def group_quant(x: torch.Tensor, *, spec: QuantSpec = VLLM) -> QuantizedActivation:
    """x [..., K] quantized."""
    return _to_vllm(ops.group_quant(x, spec=spec), x.dtype)


def input_spec(layer: torch.nn.Module) -> QuantSpec:
    """How a block-FP8 linear layer of vLLM quantizes its input: group, scale encoding and scale layout.

    Raises ValueError for a layer without such a kernel, and for a kernel that takes bf16 and quantizes inside.
    """
    try:
        return quantization_of(_kernel(layer).quant_fp8)
    except ValueError as reason:
        raise ValueError(f"{_name(layer)}: {reason}") from None


def block_linear(
    layer: torch.nn.Module, activation: QuantizedActivation, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The layer's block-FP8 GEMM, by the kernel that vLLM chose for it, on an activation that is quantized already.

    activation: [..., K], made with `input_spec(layer)`. bias: [N] or None. Returns [..., N] in the layer's out dtype.
    As `layer.quant_method.apply`, this does no collective: with tensor parallelism that is left to the caller.
    """
    kernel = _kernel(layer)
    if activation.quant_key not in KEYS.values():
        raise ValueError(f"the activation has key {activation.quant_key}; block FP8 takes groups of 128 or 64")
    k = activation.data.shape[-1]
    data, scale = activation.data.view(-1, k), activation.scale  # [M, K] fp8
    if scale.dim() != 2:  # with one leading dimension, a view would restride a single row
        scale = scale.view(-1, scale.shape[-1])
    params = kernel._get_layer_params(layer)
    out = kernel.apply_block_scaled_mm(A=data, B=params.weight, As=scale, Bs=block_scale(params))  # [M, N]
    out = out if bias is None else out + bias
    return out.to(kernel.config.out_dtype).view(*activation.orig_shape[:-1], out.shape[-1])


def _kernel(layer: torch.nn.Module) -> Any:
    kernel = kernel_of(layer)
    if kernel is None:
        raise ValueError(
            f"{_name(layer)} has no block-FP8 kernel; a linear layer of a block-FP8 checkpoint is accepted"
        )
    if not kernel.apply_input_quant:
        raise ValueError(f"{_name(layer)} uses {type(kernel).__name__}, which takes bf16 and quantizes inside")
    return kernel


def _to_vllm(quantized: Any, dtype: torch.dtype) -> QuantizedActivation:
    group = quantized.spec.group
    if group not in KEYS:
        raise ValueError(f"the group is {group}; vLLM has keys for {', '.join(map(str, KEYS))}")
    return QuantizedActivation(quantized.data, quantized.scale, dtype, quantized.shape, KEYS[group])


def _name(layer: torch.nn.Module) -> str:
    return getattr(layer, "prefix", "") or type(layer).__name__
