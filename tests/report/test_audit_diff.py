"""Two audits side by side."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from shared.generated_code import OFF, ON

from normquant.audit import audit_path
from normquant.report import audit_diff


def report_of(path: Any) -> dict[str, Any]:
    return audit_path(path, rows=(64,))[0].to_dict()


@pytest.fixture
def report() -> dict[str, Any]:
    return report_of(ON)


def test_no_difference_is_said_plainly(report: dict[str, Any]) -> None:
    text = audit_diff.render(report, copy.deepcopy(report), ("a", "b"))
    assert "the same launches with the same bytes" in text and audit_diff.changes(report, report) == []


def test_a_kernel_that_grew_is_a_change(report: dict[str, Any]) -> None:
    after = copy.deepcopy(report)
    after["programs"][0]["launches"][13]["bytes_read"] += 1 << 20
    (change,) = audit_diff.changes(report, after)
    assert change.count == (1, 1) and change.bytes[1] - change.bytes[0] == 1 << 20


def test_the_difference_reads_like_what_it_is() -> None:
    off, on = report_of(OFF), report_of(ON)
    changes = {change.origin: change.count for change in audit_diff.changes(off, on)}
    assert changes["_C.rms_norm_per_block_quant"] == (0, 3)
    assert changes["_C.per_token_group_fp8_quant"] == (4, 1)
    assert changes["mutated-input-copy of the input arg6_1 [s72, 7168]"] == (0, 1)
    assert changes["vllm_ir.fused_add_rms_norm _C.per_token_group_fp8_quant"] == (2, 0)
    assert "vllm.fp8_gemm_nt_op" not in changes
    text = audit_diff.render(off, on, ("off", "on"))
    assert "+  _C.rms_norm_per_block_quant" in text and "mutated-input-copy       0      1      +1" in text
