"""The model of `normquant bench vllm`: DeepSeek-R1 at one GPU's share of eight, block FP8, as a transformers config."""

from __future__ import annotations

from typing import Any

VOCABULARY = 4096  # the embedding and the logits are not what is measured


def config(layers: int, moe: int = 0) -> dict[str, Any]:
    """config.json of `layers` layers, of which the last `moe` have 256 experts and the others a dense MLP.

    Raises ValueError where there are fewer layers than layers with experts.
    """
    if not 0 <= moe <= layers or layers < 1:
        raise ValueError(f"{moe} of {layers} layers with experts; 1 or more layers, and as many of them or fewer")
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "ep_size": 1,
        "first_k_dense_replace": layers - moe,
        "hidden_act": "silu",
        "hidden_size": 7168,
        "initializer_range": 0.02,
        "intermediate_size": 2304,
        "kv_lora_rank": 512,
        "max_position_embeddings": 16384,
        "moe_intermediate_size": 256,
        "moe_layer_freq": 1,
        "n_group": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 16,
        "num_experts_per_tok": 8,
        "num_hidden_layers": layers,
        "num_key_value_heads": 16,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
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
        "v_head_dim": 128,
        "vocab_size": VOCABULARY,
    }


def cache_bytes(model: dict[str, Any], tokens: int) -> int:
    """Bytes of a bfloat16 latent cache for so many tokens."""
    return 2 * tokens * model["num_hidden_layers"] * (model["kv_lora_rank"] + model["qk_rope_head_dim"])
