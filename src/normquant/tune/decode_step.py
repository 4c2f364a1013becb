"""The step in which `normquant tune --decode` tries launch configs: one GEMM for all products, a config for each op."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from normquant.bench.products import start_early
from normquant.bench.shard_step import DEEPSEEK_R1, SPEC, CallOp, DecodeStep, Layer, followed
from normquant.kernels.configs import Config
from normquant.linear import HOPPER, pad_weight_scale
from normquant.ops import OPS

DEEP_GEMM = ("deep_gemm", "vllm.third_party.deep_gemm")  # where it may be imported from

Configs = Mapping[str, Config]  # by op


@dataclass(frozen=True)
class Gemm:
    """A block-FP8 GEMM: run(data [M, K], scale, weight [N, K], weight_scale) -> [M, N] bf16, and `layout`, for the
    scales of a weight."""

    name: str
    run: Callable[..., torch.Tensor]
    layout: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.contiguous


def step_of(layers: tuple[Layer, ...], gemm: Gemm, configs: Configs) -> DecodeStep:
    """A step of DeepSeek-R1 with these configs."""
    call = launching(configs)
    return DecodeStep(DEEPSEEK_R1, layers, call, followed(gemm.run, call))


def launching(configs: Configs) -> CallOp:
    """Calls of the ops' kernels with these configs, of those that have none as the table says."""

    def call(op: str, *args: Any) -> Any:
        return OPS[op].run(*args, SPEC, config=configs.get(op))

    return call


def find_gemm(capability: tuple[int, int]) -> Gemm:
    """DeepGEMM where it is installed, else cuBLASLt through `block_fp8_linear`; raises ValueError without either."""
    for name in DEEP_GEMM:
        try:
            module = import_module(name)
        except ImportError:
            continue
        if hasattr(module, "fp8_gemm_nt"):
            return deep_gemm(name, module)
    if capability != HOPPER:
        raise ValueError("a decode step needs a block-FP8 GEMM: install deep_gemm, or take a Hopper GPU for cuBLASLt")
    return Gemm("cuBLASLt (torch's scaled_mm)", own_gemm, pad_weight_scale)


def deep_gemm(name: str, module: Any) -> Gemm:
    """DeepGEMM, with programmatic dependent launch."""
    start_early(module)

    def run(data: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        out = torch.empty((data.shape[0], weight.shape[0]), dtype=torch.bfloat16, device=data.device)
        module.fp8_gemm_nt((data, scale), (weight, by), out, disable_ue8m0_cast=False)
        return out

    return Gemm(f"DeepGEMM ({name})", run)


def own_gemm(data: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """The GEMM of `normquant.linear`."""
    return torch.ops.normquant.block_fp8_linear(data, scale, weight, by, torch.bfloat16)
