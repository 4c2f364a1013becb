"""A decode step: layers of one of eight shards of DeepSeek-R1, these kernels between block-FP8 products.

A kernel's inputs have just been written by a product, the next product sets itself up meanwhile, and the weights of the
other layers go through the L2 in between. A layer begins with the rows that the norm before it has quantized and ends
with the norm of the next one, so that each of its five products is followed by the op that reads it; who multiplies,
and whether in one kernel with that op, is up to the step. The attention is stood in for by what surrounds it once its
weights are absorbed: the batched products with W_UK and W_UV (DeepSeek-V2, arXiv 2405.04434, section 2.1.2).
All-reduces are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from normquant.bench.cases import ADD_NORM, LATENTS, QUANT, ROPE, SILU
from normquant.bench.decoder_layers import MODELS
from normquant.linear import quantize_weight
from normquant.ops import group_quant
from normquant.spec import QuantSpec

SPEC = QuantSpec(layout="col_tma", scale="ue8m0")  # as vLLM has them for DeepGEMM on Hopper
MODEL = "deepseek-r1"
LAYERS = 8  # together some 700 MB of weights, of which an L2 of 50 MB keeps nothing until the next replay
EPS = 1e-6
ANGLES = 4096  # positions of the cos and sin cache

CallOp = Callable[..., Any]  # op, x, its other arguments but the spec -> its outputs
Then = Callable[..., Any]  # op, data, scale, linear, the other arguments -> the op's outputs for x = their product


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


DEEPSEEK_R1 = shard_of(MODELS[MODEL].config)


@dataclass(frozen=True)
class Linear:
    """weight [N, K] fp8 and the scales of its 128x128 blocks [ceil(N/128), ceil(K/128)] fp32."""

    weight: torch.Tensor
    scale: torch.Tensor


@dataclass(frozen=True)
class Layer:
    """Weights of a layer from its first linear on, and the input norm of the next; linears block-FP8, others bf16."""

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
    next_norm: torch.Tensor


@dataclass(frozen=True)
class StepInputs:
    """Of a step of M tokens: data [M, hidden] fp8 and its scale, residual [M, hidden] bf16; cos, sin [ANGLES, rope/2]
    bf16, positions [M] int64."""

    data: torch.Tensor
    scale: torch.Tensor
    residual: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    positions: torch.Tensor


@dataclass(frozen=True)
class DecodeStep:
    """The layers and who runs them: call(op, x, *args), and then(op, data, scale, linear, *args) for x = a product.

    Both give the outputs of the op as a tuple; `args` are its other arguments, the spec left out.
    """

    shard: Shard
    layers: tuple[Layer, ...]
    call: CallOp
    then: Then


def followed(multiply: Callable[..., torch.Tensor], call: CallOp) -> Then:
    """A product in bf16 and the op, each in its kernel. multiply: data, scale, weight, weight_scale -> [M, N]."""

    def then(op: str, data: torch.Tensor, scale: torch.Tensor, linear: Linear, *args: Any) -> Any:
        return call(op, multiply(data, scale, linear.weight, linear.scale), *args)

    return then


def layers(
    shard: Shard,
    count: int,
    layout: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.contiguous,
    device: str = "cuda",
    seed: int = 0,
) -> tuple[Layer, ...]:
    """`count` layers of random weights, under which every activation has a variance of about one.

    layout: what the products want done to the scales of a weight.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def norm(k: int) -> torch.Tensor:
        return torch.rand(k, generator=generator, device=device).add_(0.5).bfloat16()

    def linear(n: int, k: int) -> Linear:
        weight, scale = quantize_weight(randn(n, k) / k**0.5)
        return Linear(weight, layout(scale))

    def layer() -> Layer:
        s = shard
        return Layer(
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
            next_norm=norm(s.hidden),
        )

    return tuple(layer() for _ in range(count))


def inputs(shard: Shard, m: int, device: str = "cuda", seed: int = 0) -> StepInputs:
    """Random inputs of a step of m tokens."""
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)

    x, residual, cache = randn(m, shard.hidden), randn(m, shard.hidden), randn(ANGLES, shard.rope)
    cos, sin = cache[:, : shard.rope // 2], cache[:, shard.rope // 2 :]
    positions = torch.randint(0, ANGLES, (m,), generator=generator, device=device)
    q = group_quant(x, spec=SPEC)
    return StepInputs(q.data, q.scale, residual, cos, sin, positions)


def run(step: DecodeStep, inputs: StepInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All layers on the inputs: -> data [M, hidden] fp8, its scale, residual [M, hidden] bf16."""
    data, scale, residual = inputs.data, inputs.scale, inputs.residual
    for layer in step.layers:
        data, scale, residual = run_layer(step, layer, inputs, data, scale, residual)
    return data, scale, residual


def run_layer(
    step: DecodeStep, layer: Layer, inputs: StepInputs, data: torch.Tensor, scale: torch.Tensor, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantized rows and residual [M, hidden] -> those of the next layer."""
    s, then, angles = step.shard, step.then, (inputs.cos, inputs.sin, inputs.positions)
    norms = layer.q_norm, layer.kv_norm
    data, scale, *_ = then(LATENTS, data, scale, layer.qkv_a, *norms, *angles, EPS, "interleaved")
    (q,) = then(ROPE, data, scale, layer.q_b, *angles, s.heads, s.rope, "interleaved")
    data, scale = step.call(QUANT, attention(s, layer, q))
    data, scale, residual, *_ = then(ADD_NORM, data, scale, layer.o, residual, layer.mlp_norm, EPS, 0.0)
    data, scale, *_ = then(SILU, data, scale, layer.gate_up, None)  # without a limit
    data, scale, residual, *_ = then(ADD_NORM, data, scale, layer.down, residual, layer.next_norm, EPS, 0.0)
    return data, scale, residual


def attention(s: Shard, layer: Layer, q: torch.Tensor) -> torch.Tensor:
    """What is before and after the attention itself: q [M, heads * (nope + rope)] -> [M, heads * v]."""
    q = q.view(-1, s.heads, s.nope + s.rope)[:, :, : s.nope].transpose(0, 1)  # [heads, M, nope]
    out = torch.bmm(torch.bmm(q, layer.w_uk), layer.w_uv)  # [heads, M, v]
    return out.transpose(0, 1).reshape(-1, s.heads * s.v)
