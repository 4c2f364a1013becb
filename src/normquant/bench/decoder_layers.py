"""Decoder layers of transformers at serving dimensions, their linears block-FP8: built, compiled and timed.

`normquant bench layer` compiles each one stock, with nested reductions where torch has them, and fused.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from normquant.bench.providers import any_rows, no_recompile_limit
from normquant.bench.records import LayerRecord, current_run, time_fields
from normquant.bench.timing import Call, modules_past_l2, time_calls
from normquant.compile import inductor_options
from normquant.linear import block_fp8
from normquant.version import VERSION

MS = (1, 16, 64, 1024, 8192)

LIBRARY = torch.library.Library("normquant_bench", "DEF")
LIBRARY.define("attention(Tensor q, Tensor k, Tensor v) -> Tensor")  # opaque, as a serving engine's attention is


@dataclass(frozen=True)
class LayerModel:
    """A decoder layer of transformers: module and class prefix, its configuration, and the width of cos and sin."""

    module: str
    prefix: str
    rope: int
    config: dict[str, Any] = field(hash=False)


def _sizes(hidden: int, intermediate: int, heads: int, kv_heads: int, **others: int) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate}
    return {**sizes, "num_attention_heads": heads, "num_key_value_heads": kv_heads, **others}


_LATENT = {"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
_DENSE = {"first_k_dense_replace": 1}
MODELS = {  # one of eight tensor-parallel shards, except for Gemma, which fits on one GPU
    "deepseek-r1": LayerModel("deepseek_v3", "DeepseekV3", 64, _sizes(7168, 2304, 16, 16, **_LATENT, **_DENSE)),
    "qwen3-32b": LayerModel("qwen3", "Qwen3", 128, _sizes(5120, 3200, 8, 1, head_dim=128)),
    "llama-3-70b": LayerModel("llama", "Llama", 128, _sizes(8192, 3584, 8, 1, head_dim=128)),
    "gemma-7b": LayerModel("gemma", "Gemma", 256, _sizes(3072, 24576, 16, 16, head_dim=256)),
}


def build(name: str, device: str, seed: int = 0) -> torch.nn.Module:
    """A layer of the model in bfloat16 with random weights, its linears block-FP8."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("normquant_bench", _attention)
    model = MODELS[name]
    configuration = importlib.import_module(f"transformers.models.{model.module}.configuration_{model.module}")
    modeling = importlib.import_module(f"transformers.models.{model.module}.modeling_{model.module}")
    config = getattr(configuration, f"{model.prefix}Config")(
        **model.config, num_hidden_layers=1, attn_implementation="normquant_bench"
    )
    torch.manual_seed(seed)
    with torch.device(device):
        layer: Any = getattr(modeling, f"{model.prefix}DecoderLayer")(config, 0)
    return block_fp8(layer.to(torch.bfloat16).eval().requires_grad_(False))


def inputs(name: str, tokens: int, device: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states [1, M, hidden], cos and sin [1, M, rope]; bfloat16."""
    model, generator = MODELS[name], torch.Generator(device).manual_seed(seed)
    shapes = (1, tokens, model.config["hidden_size"]), (1, tokens, model.rope), (1, tokens, model.rope)
    x, cos, sin = (torch.randn(s, generator=generator, device=device, dtype=torch.bfloat16) for s in shapes)
    return x, cos, sin


def forward(layer: torch.nn.Module, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The function that is compiled."""
    return layer(x, position_embeddings=(cos, sin), attention_mask=None)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[1, H, M, D] -> [1, M, H, D] contiguous, as serving kernels leave it; causal."""
    out = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).contiguous()


LIBRARY.impl("attention", _attend, "CompositeExplicitAutograd")
torch.library.register_fake(
    "normquant_bench::attention",
    lambda q, k, v: q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]),
    lib=LIBRARY,
)


def _attention(module: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
    return torch.ops.normquant_bench.attention(query, key, value), None


def settings() -> dict[str, dict[str, Any]]:
    """Inductor options by setting."""
    import torch._inductor.config as inductor

    found: dict[str, dict[str, Any]] = {"stock": {}, "normquant": inductor_options(policy="always")}
    if hasattr(inductor.triton, "nested_reduction"):
        found["nested"] = {"triton.nested_reduction": True}
    return found


def measure(name: str, ms: Sequence[int], samples: int) -> Iterator[LayerRecord]:
    """Records of a model at each M, the settings interleaved; one compile a setting serves every M above one."""
    layers = modules_past_l2(lambda seed: build(name, "cuda", seed))
    compiled = {
        setting: torch.compile(forward, fullgraph=True, options=options) for setting, options in settings().items()
    }
    for m in ms:
        with torch.no_grad(), no_recompile_limit():
            work = {setting: calls(run, layers, name, m) for setting, run in compiled.items()}
            counts = {setting: kernels(run[0]) for setting, run in work.items()}
            timings = time_calls(work, samples)
        for setting, timing in timings.items():
            fields = {**time_fields(timing, 2), "kernels": counts[setting], **asdict(current_run(VERSION))}
            yield LayerRecord("layer", name, setting, m, **fields)


def calls(run: Callable[..., torch.Tensor], layers: Sequence[torch.nn.Module], name: str, m: int) -> list[Call]:
    """One compiled call for each layer, with its own inputs."""
    found: list[Call] = []
    for seed, layer in enumerate(layers):
        sample = inputs(name, m, "cuda", seed)
        any_rows(sample, dim=1)
        found.append(functools.partial(run, layer, *sample))
        found[-1]()
    return found


def kernels(call: Call) -> int:
    """GPU kernels of one call."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    return sum(e.count for e in seen.key_averages() if not e.key.startswith(("Memcpy", "Memset", "cuda")))
