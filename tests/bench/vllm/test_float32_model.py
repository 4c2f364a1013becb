"""The float32 DeepSeek-V3 against transformers' own, dense layers and experts, and the weights that it gets."""

from __future__ import annotations

import pytest
import torch

from normquant.bench.vllm import float32_model as reference
from normquant.bench.vllm import seeded_model as weights

CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "vocab_size": 100,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 40,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
}
PROMPTS = [[5, 9, 77, 3, 3, 60, 12], [41, 8], [99]]


def peer():
    """transformers' model with weights of the size that trained ones have."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    model = DeepseekV3ForCausalLM(DeepseekV3Config(**CONFIG)).eval()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "inv_freq" not in name:
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.data.copy_(0.1 * noise if name.endswith("bias") else 1 + 0.1 * noise)
            if tensor.dim() > 1:
                tensor.data.copy_(noise if "embed" in name else noise / tensor.shape[-1] ** 0.5)
    return model


def with_vllms_names(model) -> dict[str, torch.Tensor]:
    """The weights by the names that vLLM gives them: what reads the same input is one weight."""
    found = {name: tensor.data for name, tensor in model.state_dict().items()}
    for name in [*found]:
        if name.endswith("q_a_proj.weight"):
            found[name.replace("q_a_proj", "fused_qkv_a_proj")] = torch.cat(
                [found[name], found[name.replace("q_a_proj", "kv_a_proj_with_mqa")]]
            )
        if name.endswith("gate_proj.weight"):
            found[name.replace("gate_proj", "gate_up_proj")] = torch.cat(
                [found[name], found[name.replace("gate_proj", "up_proj")]]
            )
        if name.endswith("experts.gate_up_proj"):
            found[name.replace("gate_up_proj", "w13_weight")] = found[name]
        if name.endswith("experts.down_proj"):
            found[name.replace("down_proj", "w2_weight")] = found[name]
    return found


def test_logits_are_those_of_transformers():
    model = peer()
    loaded = with_vllms_names(model)
    found = reference.logits(CONFIG, lambda name: weights.float32(loaded, name), PROMPTS)
    for prompt, rows in zip(PROMPTS, found, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([prompt])).logits[0]
        assert expected.std() > 0.1
        torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-5)


def test_ranks_with_equal_weights_are_a_model_of_their_shares_together():
    shard, ranks = with_vllms_names(peer()), 2

    def doubled(name: str) -> torch.Tensor:
        weight = weights.float32(shard, name)
        if name.endswith(("embed_tokens.weight", "lm_head.weight", "q_b_proj.weight", "kv_b_proj.weight")):
            return torch.cat([weight] * ranks)
        if name.endswith(("q_b_proj", "kv_b_proj")):
            return torch.cat([weight] * ranks)
        if "gate_up_proj" in name or "w13_weight" in name:
            gate, up = weight.chunk(2)
            return torch.cat([gate] * ranks + [up] * ranks)
        if name.endswith(("o_proj", "o_proj.weight", "down_proj.weight")) or "w2_weight" in name:
            return torch.cat([weight] * ranks, -1)
        return weight

    whole = CONFIG | {name: ranks * CONFIG[name] for name in weights.SPLIT} | {"vocab_size": 200}
    prompts = [[*PROMPTS[0], 150], *PROMPTS[1:]]  # a token of the second rank's part
    found = reference.logits(CONFIG, lambda name: weights.float32(shard, name), prompts, ranks)
    for a, b in zip(found, reference.logits(whole, doubled, prompts), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_every_expert_counts():
    loaded = with_vllms_names(peer())
    before = reference.logits(CONFIG, lambda name: weights.float32(loaded, name), PROMPTS)[0]
    loaded["model.layers.2.mlp.experts.w2_weight"] = -loaded["model.layers.2.mlp.experts.w2_weight"]
    after = reference.logits(CONFIG, lambda name: weights.float32(loaded, name), PROMPTS)[0]
    assert (after - before).abs().max() > 0.1


class Layers(torch.nn.Module):
    """Parameters as a vLLM model has them before it changes their layouts."""

    def __init__(self) -> None:
        super().__init__()
        fp8, shape = torch.float8_e4m3fn, {"linear": (192, 256), "routed_experts": (3, 128, 256)}
        for name, size in shape.items():
            layer = torch.nn.Module()
            blocks = (*size[:-2], -(-size[-2] // 128), size[-1] // 128)
            layer.weight = torch.nn.Parameter(torch.zeros(size).to(fp8), requires_grad=False)
            layer.weight_scale_inv = torch.nn.Parameter(torch.zeros(blocks), requires_grad=False)
            setattr(self, name, layer)
        self.norm = torch.nn.RMSNorm(512, dtype=torch.bfloat16)
        self.embed_tokens = torch.nn.Embedding(64, 256, dtype=torch.bfloat16)
        self.lm_head = torch.nn.Linear(256, 64, bias=False, dtype=torch.bfloat16)
        self.k_scale = torch.nn.Parameter(torch.tensor(-1.0))


def test_weights_are_those_of_their_names():
    torch.set_default_dtype(torch.bfloat16)  # as vLLM loads weights
    try:
        first, second = weights.fill(Layers()), weights.fill(Layers())
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(first[n].float(), second[n].float()) for n in first)
    assert first["k_scale"] == -1
    assert not torch.equal(first["linear.weight"].float()[:128], first["routed_experts.weight"].float()[0])


def test_weights_have_the_size_of_trained_ones():
    found = weights.fill(Layers())
    linear = weights.float32(found, "linear.weight")
    assert (linear.std() * 256**0.5).item() == pytest.approx(1, abs=0.05)
    assert weights.float32(found, "lm_head.weight").std() * 256**0.5 == pytest.approx(1, abs=0.05)
    assert weights.float32(found, "embed_tokens.weight").std() == pytest.approx(1, abs=0.05)
    assert weights.float32(found, "norm.weight").mean() == pytest.approx(1, abs=0.05)


def test_scales_are_powers_of_two_that_use_the_range_of_fp8():
    found = weights.fill(Layers())
    for name in ("linear.weight", "routed_experts.weight"):
        scale = found[name + weights.SCALE]
        assert torch.equal(scale, torch.exp2(torch.log2(scale).round()))
        largest = found[name].float().abs().max()
        assert 224 <= largest <= 448


def test_an_experts_weight_is_its_own():
    found = weights.fill(Layers())
    one = weights.float32(found, "routed_experts.weight[1]")
    scale = found["routed_experts.weight_scale_inv"][1].repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert torch.equal(one, found["routed_experts.weight"][1].float() * scale)


def test_a_parameter_that_no_deepseek_has_is_named():
    model = torch.nn.Module()
    model.odd = torch.nn.Parameter(torch.zeros(2, 2, 2))
    with pytest.raises(ValueError, match=r"odd is \(2, 2, 2\)"):
        weights.fill(model)
