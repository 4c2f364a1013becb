"""Real vLLM on a CPU without compilation: norms and gated products hand over, nothing changes, and whatever else vLLM
does with a model.

Every form that is taken is compared with a fresh quantization.
"""

from __future__ import annotations

from typing import Any

import pytest

LAYERS = range(3)
NORMS = {f"layers.{i}.{norm}" for i in LAYERS for norm in ("input_layernorm", "post_attention_layernorm")}
LATENTS = {f"layers.{i}.self_attn.q_a_layernorm" for i in LAYERS}
PRODUCTS = {f"layers.{i}.mlp.act_fn" for i in LAYERS}
UNREAD = "in the first forward pass no block-FP8 linear and no experts read the tensor that it returned"
LEFT = {
    "self_attn.kv_a_layernorm": UNREAD,
    "self_attn.kv_b_proj": "its input is what kv_a_layernorm gives, as another tensor",
    "self_attn.o_proj": "its input is what mla_attn.mla_attn gives",
}
DENSE = [f"layers.{i}.{norm}" for i in range(6) for norm in ("input_layernorm", "post_attention_layernorm")]
DENSE += [f"layers.{i}.mlp.act_fn" for i in range(6)]
CALLS = {"rms_norm_quant_with_norm": 1, "add_rms_norm_quant_with_norm": 11, "silu_mul_quant_with_product": 6}  # a step


def complaints(run: Any) -> list[str]:
    """Lines of the log in which the plugin warns of more than that nothing is compiled."""
    said = [line for line in run.log.splitlines() if "WARNING" in line and "normquant" in line]
    return [line for line in said if "does not compile" not in line]


def test_every_norm_and_product_hands_over_and_nothing_changes(eager_on: Any, eager_off: Any) -> None:
    assert eager_off.result["calls"] == {} and eager_off.report is None
    calls = dict(eager_on.result["calls"])
    del calls["group_quant"]  # of the check
    assert calls == {
        "rms_norm_quant_with_norm": 4,
        "add_rms_norm_quant_with_norm": 5,
        "silu_mul_quant_with_product": 3,
    }
    assert {site["name"] for site in eager_on.sites if site["fused"]} == NORMS | LATENTS | PRODUCTS
    assert eager_on.result["tokens"] == eager_off.result["tokens"]
    assert eager_on.result["logprobs"] == eager_off.result["logprobs"]
    assert complaints(eager_on) == []


def test_the_report_says_why_the_others_stay(eager_on: Any) -> None:
    (record,) = eager_on.records
    assert {site["name"]: site["reason"] for site in record.report["others"]} == {
        "norm": UNREAD,
        **{f"layers.{i}.{name}": reason for i in LAYERS for name, reason in LEFT.items()},
    }


def test_the_log_says_that_nothing_is_compiled(eager_on: Any, eager_off: Any) -> None:
    (line,) = [line for line in eager_on.log.splitlines() if "does not compile" in line]
    assert "(DeepseekV3ForCausalLM) (compilation mode NONE, by --enforce-eager)" in line and "WARNING" in line
    (line,) = [line for line in eager_on.log.splitlines() if "hand over their" in line]
    assert "12 of 12 norms and gated products" in line and "`normquant vllm-report " in line
    assert "normquant" not in eager_off.log.replace("normquant_vllm_shims", "").replace("normquant_shim", "")


@pytest.mark.parametrize("name", ["dense_eager_on", "chunked_on", "speculative_on", "lora_on"])
def test_with_other_features_of_vllm(
    name: str, dense_eager_off: Any, dense_eager_on: Any, chunked_on: Any, speculative_on: Any, lora_on: Any
) -> None:
    runs = {"dense_eager_on": dense_eager_on, "chunked_on": chunked_on}
    run = (runs | {"speculative_on": speculative_on, "lora_on": lora_on})[name]
    assert [site["name"] for site in run.sites if site["fused"]] == DENSE
    calls = {name: count for name, count in run.result["calls"].items() if name != "group_quant"}
    steps = calls["rms_norm_quant_with_norm"]
    assert calls == {name: count * steps for name, count in CALLS.items()}
    assert run.result["tokens"] == dense_eager_off.result["tokens"]
    assert complaints(run) == []
