"""A DeepSeek-V3 in float32 and plain torch: what the logits would be if only the weights were rounded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

Weight = Callable[[str], torch.Tensor]  # by vLLM's name, float32


def logits(
    config: Mapping[str, Any], weight: Weight, prompts: Sequence[Sequence[int]], ranks: int = 1
) -> list[torch.Tensor]:
    """Logits [T, vocabulary] float32 of each prompt of T tokens.

    ranks: how many have this share of a model, all with the same weights: what they add is so many times that of one,
    and the vocabulary is so many times its part.
    config: the model's config.json. weight: its weights by vLLM's names, in float32, on the device to compute on;
    an expert's weight by the name of the whole and "[e]".
    """
    lengths = [len(prompt) for prompt in prompts]
    tokens = torch.tensor([token for prompt in prompts for token in prompt])
    embedding = weight("model.embed_tokens.weight")
    h = embedding[tokens.to(embedding.device) % len(embedding)]  # [T, hidden], all prompts in a row
    with full_precision(), torch.no_grad():
        for index in range(config["num_hidden_layers"]):
            h = layer(config, weight, index, h, lengths, ranks)
        h = rms_norm(config, h, weight("model.norm.weight"))
        return list((h @ weight("lm_head.weight").t()).repeat(1, ranks).split(lengths))


def layer(
    config: Mapping[str, Any], weight: Weight, index: int, h: torch.Tensor, lengths: Sequence[int], ranks: int
) -> torch.Tensor:
    """One decoder layer on the residual stream [T, hidden]."""
    prefix = f"model.layers.{index}"
    h = h + ranks * attention(
        config,
        lambda name: weight(f"{prefix}.self_attn.{name}.weight"),
        rms_norm(config, h, weight(f"{prefix}.input_layernorm.weight")),
        lengths,
    )
    y = rms_norm(config, h, weight(f"{prefix}.post_attention_layernorm.weight"))
    if index < config["first_k_dense_replace"]:
        return h + ranks * mlp(y, weight(f"{prefix}.mlp.gate_up_proj.weight"), weight(f"{prefix}.mlp.down_proj.weight"))
    return h + ranks * experts(config, lambda name: weight(f"{prefix}.mlp.{name}"), y)


def attention(config: Mapping[str, Any], weight: Weight, x: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Latent attention of x [T, hidden], causal within each prompt."""
    heads, nope, rope = config["num_attention_heads"], config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    latent = x @ weight("fused_qkv_a_proj").t()
    q_a, kv_a, k_rope = latent.split([config["q_lora_rank"], config["kv_lora_rank"], rope], -1)
    q = rms_norm(config, q_a, weight("q_a_layernorm")) @ weight("q_b_proj").t()
    kv = rms_norm(config, kv_a, weight("kv_a_layernorm")) @ weight("kv_b_proj").t()
    q = q.unflatten(-1, (heads, nope + rope))  # [T, heads, nope + rope]
    k, v = kv.unflatten(-1, (heads, nope + config["v_head_dim"])).split([nope, config["v_head_dim"]], -1)
    positions = torch.cat([torch.arange(n, device=x.device) for n in lengths])
    q = torch.cat([q[..., :nope], rotate(config, q[..., nope:], positions)], -1)
    k = torch.cat([k, rotate(config, k_rope.unsqueeze(1), positions).expand(-1, heads, -1)], -1)
    parts = [attend(*part) for part in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)]
    return torch.cat(parts).flatten(1) @ weight("o_proj").t()


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of one prompt; q, k [T, heads, D], v [T, heads, V] -> [T, heads, V]."""
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    later = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(later, -torch.inf).softmax(-1), v)


def rotate(config: Mapping[str, Any], x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """RoPE of x [T, heads, R], adjacent values forming a pair."""
    r = x.shape[-1]
    inverse = config["rope_theta"] ** -(torch.arange(0, r, 2, device=x.device, dtype=torch.float32) / r)
    angle = (positions[:, None].float() * inverse)[:, None]  # [T, 1, R / 2]
    even, odd = x[..., ::2], x[..., 1::2]
    pairs = even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin()
    return torch.stack(pairs, -1).flatten(-2)


def mlp(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """down(silu(gate) * up) of x [T, hidden]; gate_up [2 * width, hidden], down [hidden, width]."""
    gate, up = (x @ gate_up.t()).chunk(2, -1)
    return (F.silu(gate) * up) @ down.t()


def experts(config: Mapping[str, Any], weight: Weight, x: torch.Tensor) -> torch.Tensor:
    """The routed and the shared experts of x [T, hidden]."""
    chosen, share = route(config, x @ weight("gate.weight").t(), weight("gate.e_score_correction_bias"))
    out = mlp(x, weight("shared_experts.gate_up_proj.weight"), weight("shared_experts.down_proj.weight"))
    for expert in chosen.unique().tolist():
        rows, places = (chosen == expert).nonzero(as_tuple=True)
        y = mlp(x[rows], weight(f"experts.w13_weight[{expert}]"), weight(f"experts.w2_weight[{expert}]"))
        out[rows] += share[rows, places, None] * y
    return out


def route(
    config: Mapping[str, Any], router_logits: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts [T, k] that each token goes to, and their shares [T, k], of router logits [T, experts].

    The bias affects which experts are chosen, not their shares. Only experts of the `topk_group` best groups are
    chosen, a group being as good as the sum of its two best.
    """
    scores = router_logits.sigmoid()
    grouped = (scores + bias).unflatten(-1, (config["n_group"], -1))  # [T, groups, experts of each]
    best = grouped.topk(2, -1).values.sum(-1).topk(config["topk_group"], -1).indices
    outside = torch.ones(grouped.shape[:2], dtype=torch.bool, device=scores.device).scatter(1, best, False)
    chosen = grouped.masked_fill(outside[..., None], -torch.inf).flatten(1).topk(config["num_experts_per_tok"], -1)
    share = scores.gather(1, chosen.indices)
    if config["norm_topk_prob"]:
        share = share / share.sum(-1, keepdim=True)
    return chosen.indices, share * config["routed_scaling_factor"]


def rms_norm(config: Mapping[str, Any], x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """RMSNorm of x [..., K]."""
    return x * (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).rsqrt() * weight


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 matrix products in float32, not TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
