"""Real vLLM on a CPU with a small block-FP8 DeepSeek-V3: plugin on and off, caches, and what may go wrong.

The engines are conftest's; a test has what one did by the name of its setting.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from normquant.compile.driver import VLLM_FUSIONS
from normquant.vllm.graph_records import FILE

# The graph between the attentions of layers 0 and 1 is also that between layers 1 and 2; vLLM compiles it once.
COMPILED_SITES = {
    "layers.0.input_layernorm",
    "layers.0.self_attn.mla_attn.q_a_layernorm",
    "layers.0.post_attention_layernorm",
    "layers.1.input_layernorm",
    "layers.1.self_attn.mla_attn.q_a_layernorm",
    "layers.2.post_attention_layernorm",
}
COMPILED_OTHERS = {
    "layers.0.mlp.act_fn",
    "layers.2.mlp.act_fn",
    "layers.0.self_attn.mla_attn.o_proj.quant_method.fp8_linear.quant_fp8",
    "layers.2.self_attn.mla_attn.o_proj.quant_method.fp8_linear.quant_fp8",
}
COMPILED_ROTATIONS = {"layers.0.self_attn.mla_attn", "layers.1.self_attn.mla_attn"}  # of q
# In a step: layer 0's first norm has no residual; the q_a norms are in one kernel with the rest of the latent.
CALLS = {
    "rms_norm_quant": 1,
    "latent_norm_quant": 3,
    "rope_last": 3,
    "add_rms_norm_quant": 5,
    "silu_mul_quant": 3,
    "group_quant": 3,
}


def assert_same_output(given: Any, expected: Any) -> None:
    assert given.result["tokens"] == expected.result["tokens"]
    assert given.result["logprobs"] == expected.result["logprobs"]


def test_without_a_switch_vllm_is_stock(off: Any) -> None:
    assert off.result["calls"] == {} and off.says == []
    assert Path(off.result["cache"]).is_dir() and off.report is None


def test_the_model_is_no_constant(off: Any) -> None:
    assert len({token for row in off.result["tokens"] for token in row}) > 8  # or equal tokens would say nothing


def test_every_site_is_one_op(on: Any) -> None:
    assert sorted(site["name"] for site in on.sites) == sorted(COMPILED_SITES | COMPILED_OTHERS | COMPILED_ROTATIONS)
    assert [site["reason"] for site in on.sites if not site["fused"]] == []
    assert on.result["calls"] == CALLS


def test_every_site_is_exact(on: Any) -> None:
    compared = [json.loads(line) for line in (on.folder / "sites.jsonl").read_text().splitlines()]
    assert {site["name"] for site in compared} == COMPILED_SITES
    for site in compared:
        assert site["values"]["compared"] and site["scales"]["compared"]
        assert [site[part]["differ"] for part in ("values", "scales", "others")] == [0, 0, 0], site


def test_greedy_tokens_are_the_same(on: Any, off: Any) -> None:
    assert_same_output(on, off)


def test_the_log_names_the_report(on: Any) -> None:
    (line,) = on.says
    assert f"`normquant vllm-report {on.result['cache']}`" in line and "policy always" in line


def test_switching_on_does_not_serve_the_stock_graph(on: Any, off: Any) -> None:
    assert on.folder == off.folder
    assert on.result["cache"] != off.result["cache"] and on.result["hash"] != off.result["hash"]


def test_switching_on_again_finds_the_fused_graph(on_again: Any, on: Any, off: Any) -> None:
    assert on_again.result["hash"] == on.result["hash"]
    assert (Path(on.result["cache"]) / FILE).read_text() == on.report  # from the cache: nothing was compiled
    assert on_again.result["calls"] == CALLS
    assert_same_output(on_again, off)


def test_switching_off_again_finds_the_stock_graph(off_again: Any, off: Any) -> None:
    assert off_again.result["hash"] == off.result["hash"] and off_again.result["calls"] == {}
    assert_same_output(off_again, off)


def test_an_unknown_version_is_left_alone(other_version: Any, off: Any) -> None:
    assert other_version.result["hash"] == off.result["hash"] and other_version.result["calls"] == {}
    (line,) = other_version.says
    assert "leaves vLLM as it is" in line and "0.26 to 0.26 are supported" in line
    assert_same_output(other_version, off)


def test_a_failing_pass_does_not_stop_the_engine(failing_pass: Any, off: Any) -> None:
    assert failing_pass.result["calls"] == {}
    error = "; ".join(f"RuntimeError: planted by a test in fusion {i}" for i in range(len(VLLM_FUSIONS)))
    assert {record.report["error"] for record in failing_pass.records} == {error}
    assert failing_pass.log.count(f"normquant left a graph as it was: {error}") == 3  # graphs
    assert_same_output(failing_pass, off)


def test_the_rotation_of_deepseek_r1_is_in_the_latent_too(yarn_on: Any, yarn_off: Any, off: Any) -> None:
    assert yarn_off.result["tokens"] != off.result["tokens"]  # it is another rotation
    assert [site["reason"] for site in yarn_on.sites if not site["fused"]] == []
    assert yarn_on.result["calls"] == CALLS
    assert_same_output(yarn_on, yarn_off)


def test_quantization_in_plain_torch_is_found_too(native_quant: Any) -> None:
    assert {site["name"] for site in native_quant.sites} == COMPILED_SITES | COMPILED_ROTATIONS
    assert [site["reason"] for site in native_quant.sites if not site["fused"]] == []
    calls = {name.removesuffix("_with_norm"): count for name, count in native_quant.result["calls"].items()}
    left = {name: count for name, count in CALLS.items() if "norm" in name or "rope" in name}
    assert calls == left  # Inductor has the gated product
