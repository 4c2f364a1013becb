"""Decoder layers of transformers with block-FP8 linears: tiny ones that run on a CPU, and of real dimensions."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from normquant.linear import BlockFP8Linear

BF16 = torch.bfloat16
TINY = dict(
    hidden_size=512, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=128, vocab_size=128
)
MLA = dict(q_lora_rank=256, kv_lora_rank=128, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, vocab_size=128)
# name -> (class prefix, configuration of a tiny layer, of a real one at one shard of eight)
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "deepseek_v3": (
        "DeepseekV3",
        dict(hidden_size=512, intermediate_size=256, num_attention_heads=2, num_key_value_heads=2, **MLA),
        dict(
            hidden_size=7168,
            intermediate_size=2304,
            num_attention_heads=16,
            num_key_value_heads=16,
            **MLA | dict(q_lora_rank=1536, kv_lora_rank=512),
        ),
    ),
    "qwen3": ("Qwen3", TINY, TINY | dict(hidden_size=5120, intermediate_size=3200, num_attention_heads=8)),
    "llama": ("Llama", TINY, TINY | dict(hidden_size=8192, intermediate_size=3584, num_attention_heads=8)),
    "gemma": ("Gemma", TINY, TINY | dict(hidden_size=3072, intermediate_size=3072, num_attention_heads=2)),
}


def decoder_layer(name: str, config: dict[str, Any], linear: Callable[[torch.nn.Linear], torch.nn.Module]) -> Any:
    """A layer of the model with every linear replaced; attention is `normquant_test_attention`."""
    prefix = MODELS[name][0]
    modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    configuration = importlib.import_module(f"transformers.models.{name}.configuration_{name}")
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("normquant_test_attention", attention)
    made = getattr(configuration, f"{prefix}Config")(
        **config, num_hidden_layers=2, attn_implementation="normquant_test_attention"
    )
    made._experts_implementation = "batched_mm"  # the default loops over the experts that were chosen
    torch.set_default_dtype(BF16)
    try:
        layer = getattr(modeling, f"{prefix}DecoderLayer")(made, 0).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    _replace(layer, linear)
    return layer


def _replace(module: torch.nn.Module, linear: Callable[[torch.nn.Linear], torch.nn.Module]) -> None:
    for name, child in module.named_children():
        if isinstance(child, torch.nn.Linear):
            setattr(module, name, linear(child))
        else:
            _replace(child, linear)


def empty_linear(linear: torch.nn.Linear) -> BlockFP8Linear:
    """The block-FP8 form of a linear layer without values, for a compile that runs nothing."""
    n, k = linear.weight.shape
    weight = torch.empty(n, k, dtype=torch.float8_e4m3fn, device=linear.weight.device)
    scale = torch.empty((n + 127) // 128, (k + 127) // 128, dtype=torch.float32, device=linear.weight.device)
    return BlockFP8Linear(weight, scale)


LIBRARY = torch.library.Library("normquant_test", "DEF")
LIBRARY.define("attention(Tensor q, Tensor k, Tensor v) -> Tensor")


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[B, H, T, D] -> [B, T, H, D] contiguous, as serving kernels leave it."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    weights = torch.softmax(q.float() @ k.float().transpose(-1, -2) / q.shape[-1] ** 0.5, -1)
    return (weights @ v.float()).to(q.dtype).transpose(1, 2).contiguous()


LIBRARY.impl("attention", _attend, "CPU")
torch.library.register_fake(
    "normquant_test::attention",
    lambda q, k, v: q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]),
    lib=LIBRARY,
)


def attention(module: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
    return torch.ops.normquant_test.attention(query, key, value), None
