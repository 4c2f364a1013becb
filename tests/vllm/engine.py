"""Run vLLM once in this process, for an object of what it did.

The model is a DeepSeek-V3 small enough for a CPU: three dense layers, block FP8, weights made up from a seed. What the
options have under "config" is another model's config.json, what they have under "compilation" replaces settings of the
compilation; the others are arguments of `vllm.LLM`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODEL: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 512,
    "intermediate_size": 512,
    "kv_lora_rank": 512,
    "max_position_embeddings": 512,
    "moe_intermediate_size": 256,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": 256,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 1024,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
}
SETTINGS: dict[str, Any] = {
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "max_model_len": 128,
    "max_num_seqs": 4,
    "dtype": "bfloat16",
    "enable_prefix_caching": False,
    "disable_log_stats": True,
    "seed": 0,
    "gpu_memory_utilization": 0.1,  # of the memory of the CPU here
}


def write_model(config: dict[str, Any]) -> str:
    """The folder of the model, beside vLLM's caches: its path is part of what they are found by."""
    directory = Path(os.environ["VLLM_CACHE_ROOT"]).parent / "model"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


def main(options: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    passes = {"fuse_norm_quant": False, "fuse_act_quant": False}  # vLLM's own exist on GPUs only
    inductor = {"emulate_precision_casts": True}  # or the norm's roundings are lost where Inductor generates it
    compilation = {
        "cudagraph_mode": "NONE",
        "compile_sizes": [],
        "pass_config": passes,
        "inductor_compile_config": inductor,
        **options.pop("compilation", {}),
    }
    model = write_model(options.pop("config", MODEL))
    llm = LLM(model=model, compilation_config=compilation, **(SETTINGS | options))
    prompts = [{"prompt_token_ids": [(7 * i + j) % 1000 + 2 for j in range(9 + i)]} for i in range(3)]
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False, logprobs=1)
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    one = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
    calls = calls_of(lambda: llm.generate(prompts[:1], one, use_tqdm=False))
    config = llm.llm_engine.vllm_config
    return {
        "calls": calls,
        "tokens": [list(o.outputs[0].token_ids) for o in outputs],
        "logprobs": [[next(iter(p.values())).logprob for p in o.outputs[0].logprobs] for o in outputs],
        "hash": config.compute_hash(),
        "cache": config.compilation_config.local_cache_dir or cache_of_first_rank(Path(os.environ["VLLM_CACHE_ROOT"])),
    }


def cache_of_first_rank(root: Path) -> str:
    """Where the first of several ranks has its graphs, which processes of their own compile; "" where none are."""
    return next((str(found) for found in root.rglob("rank_0_0/backbone")), "")


def calls_of(run: Callable[[], object]) -> dict[str, int]:
    """How often each of our ops is called while something runs, by name."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as trace:
        run()
    return {e.key.removeprefix("normquant::"): e.count for e in trace.key_averages() if e.key.startswith("normquant::")}
