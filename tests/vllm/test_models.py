"""Other block-FP8 models in real vLLM on a CPU: how much fuses in each of their layers, and that it changes nothing.

The cases and counts of vLLM's end-to-end tests of its fusions, which run on GPUs: six layers of a dense model and of
one with experts, compiled as one graph, and the dense one partitioned by Inductor.
"""

from __future__ import annotations

from typing import Any

import pytest

LAYERS = range(6)
NORMS = [f"layers.{i}.{norm}" for i in LAYERS for norm in ("input_layernorm", "post_attention_layernorm")]
ATTENTION = [f"layers.{i}.self_attn.o_proj.quant_method.fp8_linear.quant_fp8" for i in LAYERS]
DENSE = [*NORMS, *(f"layers.{i}.mlp.act_fn" for i in LAYERS), *ATTENTION]


def fused(run: Any) -> list[str]:
    """Names of the fused sites of all graphs, sorted; a site that did not fuse fails the test."""
    assert [(site["name"], site["reason"]) for site in run.sites if not site["fused"]] == []
    return sorted(site["name"] for site in run.sites)


@pytest.mark.parametrize("name", ["dense_on", "dense_partitioned"])
def test_a_dense_layer_has_two_norms_and_a_gated_product(
    name: str, dense_off: Any, dense_on: Any, dense_partitioned: Any
) -> None:
    run = {"dense_on": dense_on, "dense_partitioned": dense_partitioned}[name]
    assert fused(run) == sorted(DENSE)
    assert run.result["calls"] == {
        "rms_norm_quant": 1,  # the first norm has no residual
        "add_rms_norm_quant": 11,
        "silu_mul_quant": 6,
        "group_quant": 6,
    }
    assert dense_off.result["calls"] == {}
    assert (run.result["tokens"], run.result["logprobs"]) == (dense_off.result["tokens"], dense_off.result["logprobs"])


def test_a_layer_of_experts_has_one_norm(experts_on: Any, experts_off: Any) -> None:
    norms = [name for name in NORMS if "input" in name]  # what the experts read is quantized inside of them
    assert fused(experts_on) == sorted(norms + ATTENTION)
    assert experts_on.result["calls"] == {"rms_norm_quant": 1, "add_rms_norm_quant": 5, "group_quant": 6}
    assert experts_off.result["calls"] == {}
    assert experts_on.result["tokens"] == experts_off.result["tokens"]
    assert experts_on.result["logprobs"] == experts_off.result["logprobs"]


def test_the_models_are_no_constants(dense_off: Any, experts_off: Any) -> None:
    for run in (dense_off, experts_off):
        assert len({token for row in run.result["tokens"] for token in row}) > 8
