"""Launches counted by name."""

from __future__ import annotations

from normquant.audit import AuditReport, expectations


def test_three_fused_operators_are_counted(on: AuditReport) -> None:
    assert on.externs["_C.rms_norm_per_block_quant"] == 3
    assert expectations.count(on, "rms_norm_per_block_quant") == 3
