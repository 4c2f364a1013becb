"""A decode step: layers of one of eight tensor-parallel shards of DeepSeek-R1, these kernels between block-FP8 GEMMs.

A kernel's inputs have just been written by a GEMM, the next GEMM sets itself up meanwhile, and the weights of the other
layers go through the L2 in between. The attention is stood in for by what surrounds it once its weights are absorbed:
the batched products with W_UK and W_UV (DeepSeek-V2, arXiv 2405.04434, section 2.1.2). All-reduces are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from normquant.bench.cases import ADD_NORM, LATENTS, QUANT, ROPE, SILU
from normquant.bench.decoder_layers import MODELS
from normquant.kernels.configs import Config
from normquant.linear import HOPPER, pad_weight_scale, quantize_weight
from normquant.ops import OPS
from normquant.spec import QuantSpec

SPEC = QuantSpec(layout="col_tma", scale="ue8m0")  # as vLLM has them for DeepGEMM on Hopper
LAYERS = 8  # together some 700 MB of weights, of which an L2 of 50 MB keeps nothing until the next replay
EPS = 1e-6
ANGLES = 4096  # positions of the cos and sin cache
DEEP_GEMM = ("deep_gemm", "vllm.third_party.deep_gemm")  # where it may be imported from

Configs = Mapping[str, Config]  # by op
CallOp = Callable[..., Any]


@dataclass(frozen=True)
class Shard:
    """Widths of a shard of a DeepSeek-V3 layer with a dense MLP."""

    hidden: int
    q_lora: int
    kv_lora: int
    rope: int
    heads: int
    nope: int
    v: int
    intermediate: int

    @property
    def widths(self) -> dict[str, int]:
        """K of each op that has a table of configs."""
        return {
            ADD_NORM: self.hidden,
            LATENTS: self.q_lora,
            QUANT: self.heads * self.v,
            SILU: self.intermediate,
        }


def shard_of(config: Mapping[str, Any]) -> Shard:
    """The widths in a configuration of transformers."""
    return Shard(
        config["hidden_size"],
        config["q_lora_rank"],
        config["kv_lora_rank"],
        config["qk_rope_head_dim"],
        config["num_attention_heads"],
        config["qk_nope_head_dim"],
        config["v_head_dim"],
        config["intermediate_size"],
    )


DEEPSEEK_R1 = shard_of(MODELS["deepseek-r1"].config)


@dataclass(frozen=True)
class Linear:
    """weight [N, K] fp8 and the scales of its 128x128 blocks [ceil(N/128), ceil(K/128)] fp32."""

    weight: torch.Tensor
    scale: torch.Tensor


@dataclass(frozen=True)
class Layer:
    """Weights of a layer: the linears block-FP8, all others bf16."""

    input_norm: torch.Tensor
    qkv_a: Linear
    q_norm: torch.Tensor
    kv_norm: torch.Tensor
    q_b: Linear
    w_uk: torch.Tensor
    w_uv: torch.Tensor
    o: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True)
class StepInputs:
    """Of a step of M tokens: x, residual [M, hidden] bf16, cos, sin [ANGLES, rope/2] bf16, positions [M] int64."""

    x: torch.Tensor
    residual: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    positions: torch.Tensor


@dataclass(frozen=True)
class Gemm:
    """A block-FP8 GEMM: run(data [M, K], scale, linear) -> [M, N] bf16, and `layout`, for the scales of a weight."""

    name: str
    run: Callable[[torch.Tensor, torch.Tensor, Linear], torch.Tensor]
    layout: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.contiguous


@dataclass(frozen=True)
class DecodeStep:
    """What is the same for every config and M. call: as `launch_op`."""

    shard: Shard
    layers: tuple[Layer, ...]
    call: CallOp
    gemm: Gemm


def launch_op(op: str, *args: Any, config: Config | None = None) -> Any:
    """The outputs of an op on its arguments, the spec left out, from its kernel with this config."""
    return OPS[op].run(*args, SPEC, config=config)


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
    """DeepGEMM, with programmatic dependent launch where it has a switch for it."""
    if hasattr(module, "set_pdl"):
        module.set_pdl(True)

    def run(data: torch.Tensor, scale: torch.Tensor, linear: Linear) -> torch.Tensor:
        out = torch.empty((data.shape[0], linear.weight.shape[0]), dtype=torch.bfloat16, device=data.device)
        module.fp8_gemm_nt((data, scale), (linear.weight, linear.scale), out, disable_ue8m0_cast=False)
        return out

    return Gemm(f"DeepGEMM ({name})", run)


def own_gemm(data: torch.Tensor, scale: torch.Tensor, linear: Linear) -> torch.Tensor:
    """The GEMM of `normquant.linear`."""
    return torch.ops.normquant.block_fp8_linear(data, scale, linear.weight, linear.scale, torch.bfloat16)


def layers(shard: Shard, count: int, gemm: Gemm, device: str = "cuda", seed: int = 0) -> tuple[Layer, ...]:
    """`count` layers of random weights, under which every activation has a variance of about one."""
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def norm(k: int) -> torch.Tensor:
        return torch.rand(k, generator=generator, device=device).add_(0.5).bfloat16()

    def linear(n: int, k: int) -> Linear:
        weight, scale = quantize_weight(randn(n, k) / k**0.5)
        return Linear(weight, gemm.layout(scale))

    def layer() -> Layer:
        s = shard
        return Layer(
            input_norm=norm(s.hidden),
            qkv_a=linear(s.q_lora + s.kv_lora + s.rope, s.hidden),  # [2112, 7168]
            q_norm=norm(s.q_lora),
            kv_norm=norm(s.kv_lora),
            q_b=linear(s.heads * (s.nope + s.rope), s.q_lora),  # [3072, 1536]
            w_uk=(randn(s.heads, s.nope, s.kv_lora) / s.nope**0.5).bfloat16(),  # [16, 128, 512]
            w_uv=(randn(s.heads, s.kv_lora, s.v) / s.kv_lora**0.5).bfloat16(),  # [16, 512, 128]
            o=linear(s.hidden, s.heads * s.v),  # [7168, 2048]
            mlp_norm=norm(s.hidden),
            gate_up=linear(2 * s.intermediate, s.hidden),  # [4608, 7168]
            down=linear(s.hidden, s.intermediate),  # [7168, 2304]
        )

    return tuple(layer() for _ in range(count))


def inputs(shard: Shard, m: int, device: str = "cuda", seed: int = 0) -> StepInputs:
    """Random inputs of a step of m tokens."""
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)

    x, residual, cache = randn(m, shard.hidden), randn(m, shard.hidden), randn(ANGLES, shard.rope)
    cos, sin = cache[:, : shard.rope // 2], cache[:, shard.rope // 2 :]
    return StepInputs(x, residual, cos, sin, torch.randint(0, ANGLES, (m,), generator=generator, device=device))


def run(step: DecodeStep, inputs: StepInputs, configs: Configs) -> tuple[torch.Tensor, torch.Tensor]:
    """All layers on the inputs: -> x, residual, both [M, hidden] bf16."""
    x, residual = inputs.x, inputs.residual
    for layer in step.layers:
        x, residual = attention(step, layer, inputs, configs, x, residual)
        x, residual = mlp(step, layer, configs, x, residual)
    return x, residual


def attention(
    step: DecodeStep, layer: Layer, inputs: StepInputs, configs: Configs, x: torch.Tensor, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is before and after the attention itself: x, residual [M, hidden] -> the same."""
    s, gemm = step.shard, step.gemm.run
    data, scale, residual, *_ = step.call(ADD_NORM, x, residual, layer.input_norm, EPS, 0.0, config=configs[ADD_NORM])
    latent = gemm(data, scale, layer.qkv_a)  # [M, q_lora + kv_lora + rope]
    angles = inputs.cos, inputs.sin, inputs.positions
    norms = layer.q_norm, layer.kv_norm
    data, scale, *_ = step.call(LATENTS, latent, *norms, *angles, EPS, "interleaved", config=configs[LATENTS])
    (q,) = step.call(ROPE, gemm(data, scale, layer.q_b), *angles, s.heads, s.rope, "interleaved")
    q = q.view(-1, s.heads, s.nope + s.rope)[:, :, : s.nope].transpose(0, 1)  # [heads, M, nope]
    out = torch.bmm(torch.bmm(q, layer.w_uk), layer.w_uv)  # [heads, M, v]
    data, scale = step.call(QUANT, out.transpose(0, 1).reshape(-1, s.heads * s.v), config=configs[QUANT])
    return gemm(data, scale, layer.o), residual


def mlp(
    step: DecodeStep, layer: Layer, configs: Configs, x: torch.Tensor, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The dense MLP and the norm before it: x, residual [M, hidden] -> the same."""
    gemm = step.gemm.run
    data, scale, residual, *_ = step.call(ADD_NORM, x, residual, layer.mlp_norm, EPS, 0.0, config=configs[ADD_NORM])
    both = gemm(data, scale, layer.gate_up)  # [M, 2 * intermediate]
    data, scale, *_ = step.call(SILU, both, None, config=configs[SILU])  # without a limit
    return gemm(data, scale, layer.down), residual
