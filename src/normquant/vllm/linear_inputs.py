"""How vLLM's block-FP8 linears quantize their input, and their product on an input that is quantized already."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from normquant.compile.fusions.vllm_linear import EVERY_ROW, FLASHINFER_BELOW, input_spec
from normquant.ops._op import call_beside
from normquant.spec import QuantizedActivation, QuantSpec
from normquant.specs import VLLM, VLLM_UE8M0
from normquant.vllm import fp8_linear

GROUPS = (128, 64)  # for which vLLM has a key
FLASHINFER = "FlashInferFp8BlockScaledMMKernel"
FLASHINFER_OR_DEEPGEMM = "FlashInferFp8DeepGEMMDynamicBlockScaledKernel"
BASE = "Fp8BlockScaledMMLinearKernel"


@dataclass(frozen=True)
class LinearInput:
    """What a kernel takes. spec: how it quantizes its input.

    rows_below: it quantizes inside, and takes FlashInfer's kernel for fewer rows than that; None: it quantizes outside
    of the product. e8m0: whether DeepGEMM gets powers of two; only where it quantizes inside.
    """

    spec: QuantSpec
    rows_below: int | None = None
    e8m0: bool = False


def kernel_of(layer: Any) -> Any:
    """The block-FP8 kernel that vLLM chose for a linear layer; None for another layer."""
    kernel = getattr(getattr(layer, "quant_method", None), "fp8_linear", None)
    return kernel if hasattr(kernel, "apply_block_scaled_mm") and hasattr(kernel, "quant_fp8") else None


def input_of(layer: Any, kernel: Any) -> LinearInput:
    """How a kernel quantizes a layer's input. Raises ValueError where that is not known, or nothing can replace it."""
    if _own_apply(kernel):
        raise ValueError(f"{type(kernel).__name__} has a way of its own to quantize its input")
    if kernel.apply_input_quant:
        return LinearInput(quantization_of(kernel.quant_fp8))
    found = _self_quantizing(kernel)
    n, k = kernel._get_layer_params(layer).weight.shape
    reason = fp8_linear.lacks()
    if reason is None and (k % 128 or n % 64):
        reason = f"K is {k} and N {n}; FP8 inputs need multiples of 128 and of 64"
    if reason is not None:
        raise ValueError(f"{type(kernel).__name__} quantizes inside: {reason}")
    return found


def quantization_of(quant: Any) -> QuantSpec:
    """The spec of one of vLLM's `QuantFP8`. Raises ValueError for one that is not in groups of 128 or 64."""
    if not quant.is_group_quant or quant.static or quant.group_size not in GROUPS:
        raise ValueError("the input is quantized in another way than in groups of 128 or 64")
    if _is_packed(quant):
        return VLLM_UE8M0.replace(scale="ue8m0_packed", layout="col_tma")
    layout = "row"
    if quant.column_major_scales:
        layout = "col_tma" if quant.tma_aligned_scales else "col"
    return (VLLM_UE8M0 if quant.use_ue8m0 else VLLM).replace(group=quant.group_size, layout=layout)


def product(layer: Any, kernel: Any, given: LinearInput, form: QuantizedActivation, bias: Any = None) -> torch.Tensor:
    """What the kernel computes of an input [M, K] that is quantized: [M, N] in its out dtype."""
    params = kernel._get_layer_params(layer)
    weight, weight_scale = params.weight, block_scale(params)
    if given.rows_below is None:
        out = kernel.apply_block_scaled_mm(A=form.data, B=weight, As=form.scale, Bs=weight_scale)
    else:
        operands = form.data, form.scale, weight, weight_scale
        multiply = call_beside(weight, torch.ops.normquant_vllm.block_fp8_linear.default)
        out = multiply(*operands, given.rows_below, given.e8m0)
    if bias is not None:
        out = out + bias
    wanted = kernel.config.out_dtype
    return out if out.dtype == wanted else out.to(wanted)


def _own_apply(kernel: Any) -> bool:
    """Whether the kernel's class does something else than to quantize and multiply."""
    owner = next(cls for cls in type(kernel).__mro__ if "apply_weights" in cls.__dict__)
    return owner.__name__ != BASE


def _self_quantizing(kernel: Any) -> LinearInput:
    name = type(kernel).__name__
    if name == FLASHINFER:
        return LinearInput(input_spec(EVERY_ROW, False), EVERY_ROW)
    if name == FLASHINFER_OR_DEEPGEMM:
        deepgemm_alone = os.environ.get("VLLM_BATCH_INVARIANT", "0") != "0"
        below, e8m0 = 0 if deepgemm_alone else FLASHINFER_BELOW, bool(kernel.fallback.use_deep_gemm_e8m0)
        return LinearInput(input_spec(below, e8m0), below, e8m0)
    raise ValueError(f"{name} takes bf16 and quantizes inside")


def _is_packed(quant: Any) -> bool:
    """Whether vLLM's quantization of this layer packs its exponents, as DeepGEMM takes them on Blackwell."""
    if not (quant.use_ue8m0 and quant.use_deep_gemm_supported and quant.group_size == 128):
        return False
    from vllm.utils.deep_gemm import DeepGemmQuantScaleFMT

    return DeepGemmQuantScaleFMT.from_oracle() == DeepGemmQuantScaleFMT.UE8M0


def block_scale(params: Any) -> torch.Tensor:
    """The scale of a block-FP8 weight, from what a kernel of vLLM reads of its layer: checkpoints name it either way,
    and vLLM 0.26 does not say which."""
    found: torch.Tensor = params.weight_scale if params.weight_scale_inv is None else params.weight_scale_inv
    return found
