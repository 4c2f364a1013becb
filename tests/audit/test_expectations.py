"""Launches counted by name."""

from __future__ import annotations

from dataclasses import replace

from normquant.audit import AuditReport, expectations


def test_nothing_holds_of_code_that_launches_nothing(on: AuditReport) -> None:
    empty = replace(on, programs=(), findings=())
    said = ["the code launches nothing, so there is nothing to check"]
    assert expectations.broken([empty], ["identity"]) == said
    assert expectations.broken([empty], expected={"rms_norm_quant": 0}) == said
    assert expectations.broken([empty], max_bytes=1) == said
    assert expectations.broken([empty]) == []
    assert expectations.broken([empty], ["identity"], {"kernels": 0}) == []


def test_three_fused_operators_are_counted(on: AuditReport) -> None:
    assert on.externs["_C.rms_norm_per_block_quant"] == 3
    assert expectations.count(on, "rms_norm_per_block_quant") == 3
