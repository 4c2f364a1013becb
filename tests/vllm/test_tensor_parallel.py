"""Real vLLM on two ranks over gloo, in processes that it spawns: all-reduces with and without their switch."""

from __future__ import annotations

from collections import Counter
from typing import Any


def test_every_all_reduce_in_front_of_a_norm_is_fused(ranks_on: Any) -> None:
    assert [site["reason"] for site in ranks_on.sites if not site["fused"]] == []
    ops = Counter(site["op"] for site in ranks_on.sites if site["op"].startswith("all_reduce"))
    # Layer 0's first norm follows the embedding; the graph between two attentions is compiled once for both places.
    assert ops == {"all_reduce_rms_norm_quant": 1, "all_reduce_add_rms_norm_quant": 3, "all_reduce_add_rms_norm": 1}
    assert not any(record.report["others"] or record.report["error"] for record in ranks_on.records)


def test_without_the_switch_they_stay_and_the_report_says_why(ranks_without_switch: Any) -> None:
    assert not any("all_reduce" in site["op"] for site in ranks_without_switch.sites)
    others = [other for record in ranks_without_switch.records for other in record.report["others"]]
    assert len(others) == 5
    assert {"not measured in vLLM here; NORMQUANT_ALL_REDUCE=1 fuses it" in other["reason"] for other in others} == {
        True
    }


def test_a_sum_of_two_ranks_has_one_order_and_the_tokens_are_the_same(ranks_on: Any, ranks_without_switch: Any) -> None:
    assert ranks_on.result["tokens"] == ranks_without_switch.result["tokens"]
    assert ranks_on.result["logprobs"] == ranks_without_switch.result["logprobs"]
