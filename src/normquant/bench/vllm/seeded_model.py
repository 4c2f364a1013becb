"""The model of `normquant bench vllm`: a shard of DeepSeek-R1, one of eight, in block FP8, its weights from a seed.

The weights are of the size that trained ones have, and the same whatever kernels vLLM chooses. vLLM's own dummy weights
are so small, norms among them, that every logit is the same. Here the outputs of each linear have a variance of about
one. Block scales are powers of two, so that DeepGEMM, which asks for such scales and rounds all others to them,
computes with the same weights as Cutlass does.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch

from normquant.bench.decoder_layers import MODELS
from normquant.linear import dequantize_weight, quantize_weight

SCALE = "_scale_inv"  # vLLM's name of a weight's block scales is the weight's own and this
ROUTED = ".routed_experts."
NORM_SPREAD, BIAS_SPREAD = 0.1, 0.05

VOCABULARY = 4096  # the embedding and the logits are not what is measured
SHARD: dict[str, Any] = {
    **MODELS["deepseek-r1"].config,
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 16384,
    "moe_intermediate_size": 256,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "num_nextn_predict_layers": 0,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": VOCABULARY,
}


SPLIT = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "moe_intermediate_size")  # over ranks


def config(layers: int, moe: int = 0, ranks: int = 1) -> dict[str, Any]:
    """config.json of `layers` layers, of which the last `moe` have 256 experts and the others a dense MLP; on each of
    so many ranks it is one shard of eight.

    Raises ValueError for more layers with experts than layers.
    """
    if not 0 <= moe <= layers or layers < 1:
        raise ValueError(f"{moe} of {layers} layers with experts; accepted: at least 1 layer, and 0 to all of them")
    sizes = {"num_hidden_layers": layers, "first_k_dense_replace": layers - moe}
    return SHARD | sizes | {name: ranks * SHARD[name] for name in SPLIT}


def share(model: Mapping[str, Any], ranks: int) -> dict[str, Any]:
    """What one of so many ranks has of a model, as a config.json."""
    return dict(model) | {name: model[name] // ranks for name in SPLIT if name in model}


def cache_bytes(model: dict[str, Any], tokens: int) -> int:
    """Bytes of a bfloat16 latent cache for so many tokens."""
    return 2 * tokens * model["num_hidden_layers"] * (model["kv_lora_rank"] + model["qk_rope_head_dim"])


def fill(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Set every parameter of a vLLM model, before vLLM changes their layouts; returns copies of them on the CPU.

    Names are those of `named_parameters`, without what newer versions put between "experts" and a weight's name; an
    fp8 weight [N, K] or [experts, N, K] has its scales under `SCALE`. Scalars, which are scales of the cache, stay.
    Raises ValueError for a parameter of a dtype or shape that no DeepSeek-V3 has.
    """
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if parameter.dtype == torch.float8_e4m3fn:
            _fill_blocks(name, parameter.data, parameters[name + SCALE].data)
        elif parameter.dim() and not name.endswith(SCALE):
            parameter.data.copy_(_plain(name, parameter))
    return {name.replace(ROUTED, "."): p.data.to("cpu", copy=True) for name, p in parameters.items()}


def float32(weights: dict[str, torch.Tensor], name: str, device: torch.device | str = "cpu") -> torch.Tensor:
    """A weight that `fill` returned, or one expert's, in float32; `name` may end in "[e]" for expert e."""
    name, _, expert = name.partition("[")
    index: int | slice = int(expert[:-1]) if expert else slice(None)
    weight = weights[name][index].to(device)
    if name + SCALE not in weights:
        return weight.float()
    return dequantize_weight(weight, weights[name + SCALE][index].to(device))


def _fill_blocks(name: str, weight: torch.Tensor, scale: torch.Tensor) -> None:
    if weight.dim() == 3:
        for expert in range(weight.shape[0]):  # one at a time: all of them in float32 take gigabytes
            _fill_blocks(f"{name}[{expert}]", weight[expert], scale[expert])
        return
    values = _normal(name, weight) / weight.shape[-1] ** 0.5  # [N, K]
    powers = torch.exp2(torch.ceil(torch.log2(quantize_weight(values)[1])))  # [N/128, K/128]
    weight.copy_(dequantize_weight(values, 1 / powers).to(torch.float8_e4m3fn))
    scale.copy_(powers)


def _plain(name: str, parameter: torch.Tensor) -> torch.Tensor:
    noise = _normal(name, parameter)
    if parameter.dim() == 1:
        return BIAS_SPREAD * noise if name.endswith("bias") else 1 + NORM_SPREAD * noise
    if parameter.dim() != 2 or not parameter.dtype.is_floating_point:
        raise ValueError(f"{name} is {tuple(parameter.shape)} {parameter.dtype}; no weight of a DeepSeek-V3 is")
    return noise if name.endswith("embed_tokens.weight") else noise / parameter.shape[1] ** 0.5


def _normal(name: str, like: torch.Tensor) -> torch.Tensor:
    """Normally distributed float32 numbers in the shape of `like`, seeded by the name."""
    generator = torch.Generator(like.device).manual_seed(zlib.crc32(name.encode()))
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=torch.float32)
