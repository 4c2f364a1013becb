"""vLLM's block-FP8 linears on Hopper as operations that take what is quantized already and return the product.

The operators of its default linear take bf16 and quantize inside: FlashInfer's kernel for few rows, whose product is
computed with weights and activations swapped, and DeepGEMM for others. The same kernels run here, on FP8, so that a
norm can hand them its result. Those of the other linears, DeepGEMM alone and Cutlass, write into a tensor that they are
given.

Importing this module defines the operations; FlashInfer and vLLM are imported by the first call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch

from normquant.ops._op import TAGS, call_directly

LIBRARY = torch.library.Library("normquant_vllm", "DEF")
LIBRARY.define(
    "block_fp8_linear(Tensor data, Tensor scale, Tensor weight, Tensor weight_scale, int flashinfer_below, bool e8m0)"
    " -> Tensor",
    tags=TAGS,
)
LIBRARY.define(
    "cutlass_block_fp8_linear(Tensor data, Tensor scale, Tensor weight, Tensor weight_scale, bool float16) -> Tensor",
    tags=TAGS,
)


def block_fp8_linear(
    data: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    flashinfer_below: int,
    e8m0: bool,
) -> torch.Tensor:
    """data [M, K] fp8 times weight [N, K] fp8 -> [M, N] bf16.

    scale [M, K/128] fp32 in TMA-aligned columns, weight_scale [N/128, K/128] fp32. For fewer rows than
    `flashinfer_below` FlashInfer's kernel, else DeepGEMM, whose scales are powers of two where e8m0 says so.
    """
    if data.shape[0] < flashinfer_below:
        return _flashinfer()(data, weight, scale, weight_scale)
    out = _out(data, weight, False)
    _deepgemm()((data, scale), (weight, weight_scale), out, is_deep_gemm_e8m0_used=e8m0)
    return out


def cutlass_block_fp8_linear(
    data: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, float16: bool
) -> torch.Tensor:
    """data [M, K] fp8 times weight [N, K] fp8 -> [M, N] bf16 or fp16.

    scale [M, K/128] fp32 in columns, M apart, weight_scale [N/128, K/128] fp32, contiguous.
    """
    out = _out(data, weight, float16)
    torch.ops._C.cutlass_scaled_mm(out, data, weight.t(), scale, weight_scale.t(), None)
    return out


def _out(data: torch.Tensor, weight: torch.Tensor, float16: bool) -> torch.Tensor:
    return data.new_empty((data.shape[0], weight.shape[0]), dtype=torch.float16 if float16 else torch.bfloat16)


def _fake(data: torch.Tensor, scale: Any, weight: torch.Tensor, *args: Any) -> torch.Tensor:
    return _out(data, weight, False)


def _cutlass_fake(data: torch.Tensor, scale: Any, weight: torch.Tensor, _: Any, float16: bool) -> torch.Tensor:
    return _out(data, weight, float16)


for name, on_cuda, fake in (
    ("block_fp8_linear", block_fp8_linear, _fake),
    ("cutlass_block_fp8_linear", cutlass_block_fp8_linear, _cutlass_fake),
):
    LIBRARY.impl(name, on_cuda, "CUDA")
    call_directly(getattr(torch.ops.normquant_vllm, name).default, on_cuda)
    torch.library.register_fake(f"normquant_vllm::{name}", fake, lib=LIBRARY)


def flashinfer_version() -> str:
    """FlashInfer's version, "" where it is not installed. Nothing of it is imported, which might touch CUDA."""
    try:
        return version("flashinfer-python")
    except PackageNotFoundError:
        return ""


@cache
def lacks() -> str | None:
    """Why FP8 inputs cannot be given to the kernels that vLLM has here; None where they can."""
    if find_spec("flashinfer") is None:
        return "FlashInfer is not installed"
    try:
        accepted = inspect.signature(_flashinfer()).parameters
        _deepgemm()
    except Exception as error:  # a package that is there and broken raises whatever it likes
        return f"{type(error).__name__}: {error}"
    if "input_scale" not in accepted:
        return "this FlashInfer's fp8_blockscale_gemm_sm90 takes no scales of its input"
    return None


@cache
def _flashinfer() -> Callable[..., torch.Tensor]:
    from flashinfer.gemm import fp8_blockscale_gemm_sm90

    return fp8_blockscale_gemm_sm90


@cache
def _deepgemm() -> Callable[..., Any]:
    from vllm.utils.deep_gemm import fp8_gemm_nt

    return fp8_gemm_nt
