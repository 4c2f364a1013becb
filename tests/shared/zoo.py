"""Every causal language model of the installed transformers, made tiny: random weights, two layers, 256 wide.

A model's configuration is its own default with each size that it knows replaced by a small one, so a family that is new
in transformers is in the zoo without a line here, unless its sizes have to fit together in a way of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

HIDDEN, VOCAB, TOKENS = 256, 128, 8
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "encoder_layers", "decoder_layers")
HEADS = ("num_attention_heads", "n_head", "encoder_attention_heads", "decoder_attention_heads", "num_heads")
WIDTHS = ("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner")
EXPERT_WIDTHS = ("moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
SIZES: dict[str, Any] = {
    **dict.fromkeys(LAYERS, 2),
    **dict.fromkeys(HEADS, 4),
    **dict.fromkeys(WIDTHS, 512),
    **dict.fromkeys(EXPERT_WIDTHS, 128),
    **dict.fromkeys(EXPERTS, 4),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size", "lru_width"), HIDDEN),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), 1),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCAB),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_group_num"), 2),
    "head_dim": 64,
    "max_position_embeddings": 64,
    "first_k_dense_replace": 1,
    # latent attention, and the indexer of its sparse form
    **dict(q_lora_rank=128, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64),
    **dict(index_topk=4, index_head_dim=64, index_n_heads=2),
    # state space models and linear attention
    **dict(state_size=16, mamba_d_state=16, mamba_n_heads=8, mamba_d_head=64, mamba_num_heads=8, mamba_head_dim=64),
    **dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=64, linear_value_head_dim=64),
    **dict(chunk_size=8, hidden_size_per_layer_input=128),
    **dict(pad_token_id=0, bos_token_id=1, eos_token_id=2),
}
# Of latent attention: every head has keys of its own, and what is rotated is as wide as qk_rope_head_dim.
LATENT = {"num_key_value_heads": 4, "head_dim": 32}
# What the sizes above do not fit: model type -> sizes of its own.
OWN_SIZES: dict[str, dict[str, Any]] = {
    "bamba": dict(attn_layer_indices=[1]),
    "falcon_h1": dict(mamba_d_ssm=512),  # mamba_n_heads * mamba_d_head
    "granitemoehybrid": dict(layer_types=["mamba", "attention"]),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    **{name: dict(num_hidden_layers=4) for name in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")},
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),  # a layer of each kind
    "recurrent_gemma": dict(num_hidden_layers=3),
    "mamba2": dict(num_heads=8, head_dim=64, n_groups=1),  # num_heads * head_dim is twice the hidden size
}


@dataclass(frozen=True)
class TinyModel:
    """A family of models: its type in transformers and the class of its causal language model."""

    name: str
    class_name: str

    def build(self, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.nn.Module:
        """The model with random weights; raises what transformers raises where its sizes do not fit together."""
        import transformers

        torch.manual_seed(seed)
        model = getattr(transformers, self.class_name)._from_config(tiny_config(self.name), dtype=dtype)
        return model.eval().requires_grad_(False)


def tiny_models() -> Iterator[TinyModel]:
    """One for each class of causal language model in transformers, by the first model type that has it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names: dict[str, str] = {}
    for name, class_name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()):
        if class_name.endswith(("ForCausalLM", "LMHeadModel")) and (
            class_name not in names or _is_own(name, class_name)
        ):
            names[class_name] = name
    return iter(sorted((TinyModel(name, class_name) for class_name, name in names.items()), key=lambda m: m.name))


def _is_own(name: str, class_name: str) -> bool:
    """Whether the class is of this model type: internlm3 is read as LlamaForCausalLM, too, qwen3_5 as qwen3_5_text."""
    own = class_name.lower().startswith(name.removesuffix("_text").replace("_", "").replace("-", ""))
    return own or name.endswith("_text")


def tiny_config(name: str) -> Any:
    """The configuration of a model type with small sizes; KeyError for a type that transformers does not have."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return _shrunk(CONFIG_MAPPING[name], OWN_SIZES.get(name, {}))


def _shrunk(config_class: Any, own: dict[str, Any]) -> Any:
    default = config_class()
    known = {*default.to_dict(), *getattr(config_class, "attribute_map", {})}
    latent = LATENT if "kv_lora_rank" in known else {}
    sizes = {name: size for name, size in (SIZES | latent | own).items() if name in known}
    parts = {name: _shrunk(part, {}) for name, part in config_class.sub_configs.items() if hasattr(part, "model_type")}
    return config_class(**sizes, **parts)


def tokens(batch: int = 1) -> torch.Tensor:
    """[batch, TOKENS] token ids."""
    return torch.randint(3, VOCAB, (batch, TOKENS), generator=torch.Generator().manual_seed(0))
