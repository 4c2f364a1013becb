"""Tiny models of transformers with block-FP8 layers, one of each family: compiled, they give what eager gives.

`make zoo` runs every causal language model and writes docs/zoo.md.
"""

from __future__ import annotations

import pytest
import torch
from shared.pass_harness import keeps_roundings
from shared.zoo import TinyModel, tiny_models, tokens
from shared.zoo_outcome import zoo_outcome

from normquant.compile import clear, inductor_options, reports
from normquant.linear import convert_linears

pytest.importorskip("transformers", reason="transformers is not installed")

MODELS = {model.name: model for model in tiny_models()}
# model -> sites that are fused, at least: two a layer, and those of latent attention
FUSED = {
    "llama": 4,
    "gemma3_text": 4,  # 1 + w, norms of queries and keys, norms after each block
    "cohere": 0,  # LayerNorm without a mean of its own name
    "bitnet": 8,  # norms inside attention and MLP
    "deepseek_v3": 8,  # latent attention, experts
    "deepseek_v4": 6,
    "glm4_moe": 4,
    "gpt_oss": 0,  # experts are no linear layers
    "gpt_neox": 0,  # LayerNorm
    "qwen3_next": 11,  # gated delta nets, three with a gated norm
    "mamba2": 2,
    "bamba": 4,  # attention and state space layers
    "falcon_h1": 2,  # both in one layer
}


def tiny(name: str) -> TinyModel:
    if name not in MODELS:
        pytest.skip(f"this transformers has no {name}")
    return MODELS[name]


@keeps_roundings
@pytest.mark.parametrize("name", FUSED)
def test_the_rewritten_graphs_give_eager_values(name: str) -> None:
    outcome = zoo_outcome(tiny(name))
    assert not outcome.failure and not outcome.not_run, outcome
    assert outcome.differ == outcome.more_than_stock == 0 and outcome.values > 0, outcome
    assert outcome.fused >= FUSED[name] and outcome.converted > 0, outcome
    assert outcome.sites == outcome.fused + sum(outcome.unfused.values()) and all(outcome.unfused), outcome


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "mamba2"])
def test_generated_code_is_as_near_to_eager_as_stock(name: str) -> None:
    """Generated C++ keeps roundings out that eager has, and sums in another order: hardly a logit is eager's."""
    model, ids = convert_linears(tiny(name).build())[0], tokens()

    def logits(ids: torch.Tensor) -> torch.Tensor:
        return model(ids, use_cache=False).logits.float()

    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        eager, distance = logits(ids), {}
        for policy in ("always", "never"):
            torch._dynamo.reset()
            clear()
            compiled = torch.compile(logits, options=inductor_options(policy, strict=True))(ids)
            distance[policy] = ((compiled - eager).norm() / eager.norm()).item()
            fused = sum(len(report.fused) for report in reports())
            assert fused >= FUSED[name] if policy == "always" else not fused
    assert distance["always"] <= 1.5 * distance["never"] < 0.15, distance


def test_a_model_that_cannot_be_compared_says_why() -> None:
    outcome = zoo_outcome(TinyModel("llama", "NoSuchClass"))
    assert outcome.not_run == "transformers: AttributeError: module transformers has no attribute NoSuchClass"
    assert not outcome.failure and not outcome.sites
