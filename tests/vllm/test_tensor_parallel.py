"""Real vLLM on two ranks over gloo, in processes that it spawns: all-reduces with and without their switch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from normquant.vllm.graph_records import FILE, read

# Layer 0's first norm follows the embedding; the graph between two attentions is compiled once for both places.
OPS = {
    "layers.0.input_layernorm": "all_reduce_rms_norm_quant",
    "layers.0.post_attention_layernorm": "all_reduce_add_rms_norm_quant",
    "layers.1.input_layernorm": "all_reduce_add_rms_norm_quant",
    "layers.2.post_attention_layernorm": "all_reduce_add_rms_norm_quant",
    "norm": "all_reduce_add_rms_norm",
}


def told(run: Any, kind: str) -> dict[str, dict[str, Any]]:
    """The records of all ranks by name. A graph that one rank compiled may come to the other from Inductor's cache,
    and then only one of them has it; what both have is equal."""
    found: dict[str, dict[str, Any]] = {}
    for file in Path(run.result["cache"]).parents[1].rglob(FILE):
        for record in read(file):
            assert not record.report["error"]
            for site in record.report[kind]:
                assert found.setdefault(site["name"], site) == site
    return found


def test_every_all_reduce_in_front_of_a_norm_is_fused(ranks_on: Any) -> None:
    sites = told(ranks_on, "sites")
    assert {name: site["op"] for name, site in sites.items() if "all_reduce" in site["op"]} == OPS
    assert [site["reason"] for site in sites.values() if not site["fused"]] == [] and told(ranks_on, "others") == {}


def test_without_the_switch_they_stay_and_the_report_says_why(ranks_without_switch: Any) -> None:
    assert not any("all_reduce" in site["op"] for site in told(ranks_without_switch, "sites").values())
    others = told(ranks_without_switch, "others")
    assert set(others) == set(OPS)
    for other in others.values():
        assert other["reason"].endswith("in another order; NORMQUANT_ALL_REDUCE=1 fuses it")


def test_a_sum_of_two_ranks_has_one_order_and_the_tokens_are_the_same(ranks_on: Any, ranks_without_switch: Any) -> None:
    assert ranks_on.result["tokens"] == ranks_without_switch.result["tokens"]
    assert ranks_on.result["logprobs"] == ranks_without_switch.result["logprobs"]
