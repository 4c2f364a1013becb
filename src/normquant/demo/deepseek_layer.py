"""The layer of the demonstration: transformers' own DeepseekV3DecoderLayer with block-FP8 linears."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from normquant.linear import BlockFP8Linear, block_fp8, dequantize_weight

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Dims:
    """Sizes of one DeepSeek-V3 decoder layer with a dense MLP; every width that is quantized is a multiple of 128."""

    hidden: int
    intermediate: int
    heads: int
    q_lora: int
    kv_lora: int
    nope: int  # head dimensions without rotary embedding
    rope: int
    v_head: int


# DeepSeek-R1 on one of eight tensor-parallel GPUs: 128 heads and an MLP of 18432 are split, the rest is whole.
R1_TP8 = Dims(hidden=7168, intermediate=2304, heads=16, q_lora=1536, kv_lora=512, nope=128, rope=64, v_head=128)
# A quarter of it in every direction, rounded up to groups of 128.
SMALL = Dims(hidden=1792, intermediate=640, heads=4, q_lora=384, kv_lora=128, nope=64, rope=32, v_head=64)


def build(dims: Dims, device: str, seed: int = 0) -> torch.nn.Module:
    """The layer in bfloat16 with random weights, its linears block-FP8, its norm weights around one.

    Raises ImportError without transformers.
    """
    layer = _decoder_layer(dims, device)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.dim() == 1:
                values = 1 + 0.2 * torch.randn(parameter.shape, generator=generator)
            else:  # keeps the size of an activation through a matrix product
                values = torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5
            parameter.copy_(values)
    return block_fp8(layer)


def build_fake(dims: Dims) -> torch.nn.Module:
    """As `build` on a CUDA device, without values: for a caller under a fake tensor mode."""
    return block_fp8(_decoder_layer(dims, "cuda"))


def float64_twin(layer: torch.nn.Module) -> torch.nn.Module:
    """The same layer in exact arithmetic: float64 throughout, weights dequantized, activations never quantized."""
    twin: Any = copy.deepcopy(layer)
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BlockFP8Linear):
                setattr(parent, name, _float64_linear(child))
            elif hasattr(child, "variance_epsilon"):  # transformers' norm, which casts to float32 inside
                setattr(parent, name, _float64_norm(child))
    twin.self_attn.config._attn_implementation = "sdpa"  # transformers' eager attention has a float32 softmax
    return twin.double()


def relative_error(output: torch.Tensor, exact: torch.Tensor) -> float:
    """||output - exact|| / ||exact||, Frobenius, in float64."""
    return float((output.double() - exact).norm() / exact.norm())


def inputs(dims: Dims, tokens: int, device: str, seed: int = 0) -> Inputs:
    """One sequence: hidden states [1, M, hidden], cos and sin [1, M, rope], causal mask [1, 1, M, M]; bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, tokens, dims.hidden, generator=generator)
    frequency = 10000.0 ** -(torch.arange(0, dims.rope, 2) / dims.rope)  # [rope / 2]
    angle = torch.outer(torch.arange(tokens), frequency).repeat(1, 2)[None]  # [1, M, rope]
    mask = torch.full((tokens, tokens), torch.finfo(torch.bfloat16).min).triu(1)[None, None]
    return tuple(t.to(device, torch.bfloat16) for t in (x, angle.cos(), angle.sin(), mask))  # type: ignore[return-value]


def fake_inputs(dims: Dims, tokens: int) -> Inputs:
    """As `inputs` on a CUDA device, without values."""
    shapes = (1, tokens, dims.hidden), (1, tokens, dims.rope), (1, tokens, dims.rope), (1, 1, tokens, tokens)
    return tuple(torch.empty(s, dtype=torch.bfloat16, device="cuda") for s in shapes)  # type: ignore[return-value]


def forward(
    layer: torch.nn.Module, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """The layer's output, [1, M, hidden]; the function that is compiled."""
    return layer(x, position_embeddings=(cos, sin), attention_mask=mask)


def _decoder_layer(dims: Dims, device: str) -> torch.nn.Module:
    from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer

    config = DeepseekV3Config(
        hidden_size=dims.hidden,
        intermediate_size=dims.intermediate,
        num_attention_heads=dims.heads,
        num_key_value_heads=dims.heads,
        q_lora_rank=dims.q_lora,
        kv_lora_rank=dims.kv_lora,
        qk_nope_head_dim=dims.nope,
        qk_rope_head_dim=dims.rope,
        v_head_dim=dims.v_head,
        num_hidden_layers=1,
        first_k_dense_replace=1,
    )
    config._attn_implementation = "eager"  # SDPA allocates CUDA tensors, also where code is generated without a GPU
    with _default_dtype(torch.bfloat16), torch.device(device):  # made in bfloat16: `.to()` cannot convert fake modules
        layer: Any = DeepseekV3DecoderLayer(config, 0)
    return layer.eval().requires_grad_(False)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _float64_linear(linear: Any) -> torch.nn.Linear:
    n, k = linear.weight.shape
    plain = torch.nn.Linear(k, n, bias=linear.bias is not None, dtype=torch.float64, device=linear.weight.device)
    with torch.no_grad():
        plain.weight.copy_(dequantize_weight(linear.weight_fp8, linear.weight_scale))
        if linear.bias is not None:
            plain.bias.copy_(linear.bias)
    return plain


def _float64_norm(norm: Any) -> torch.nn.RMSNorm:
    weight = norm.weight
    plain = torch.nn.RMSNorm(weight.shape[0], norm.variance_epsilon, dtype=torch.float64, device=weight.device)
    with torch.no_grad():
        plain.weight.copy_(weight)
    return plain
