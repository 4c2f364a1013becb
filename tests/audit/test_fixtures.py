"""A decoder layer of vLLM 0.26.0 on an H100, as its compile cache held it: with its norm-quant fusion, and without."""

from __future__ import annotations

from pathlib import Path

import pytest

from normquant.audit import expectations
from normquant.audit.on_disk import audit_path
from normquant.audit.result import AuditReport
from normquant.report import audit_diff

FIXTURES = Path(__file__).parent / "fixtures"
ON, OFF = FIXTURES / "fuse_norm_quant_on_layer.py", FIXTURES / "fuse_norm_quant_off_layer.py"
M, K = 64, 7168


@pytest.fixture(scope="module")
def on() -> AuditReport:
    return audit_path(ON, rows=(M,))[0]


@pytest.fixture(scope="module")
def off() -> AuditReport:
    return audit_path(OFF, rows=(M,))[0]


def kernels_of(report: AuditReport, rule: str) -> list[str]:
    return [finding.kernel for finding in report.findings if finding.rule == rule]


def test_the_residual_copy_is_found(on: AuditReport) -> None:
    (finding,) = [f for f in on.findings if f.rule == "mutated-input-copy"]
    assert finding.kernel == "triton_poi_fused_0"
    assert finding.bytes == 2 * M * K * 2
    assert "arg6_1 [s72, 7168]" in finding.message and "_C.rms_norm_per_block_quant" in finding.message
    assert on.count("identity") == 0, "one kernel, one name for what it is"


def test_three_fused_operators_are_counted(on: AuditReport) -> None:
    assert on.externs["_C.rms_norm_per_block_quant"] == 3
    assert expectations.count(on, "rms_norm_per_block_quant") == 3


def test_dropped_ue8m0_is_found(on: AuditReport) -> None:
    assert kernels_of(on, "dropped-ue8m0").count("_C.rms_norm_per_block_quant") == 3


def test_misaligned_scales_are_found(on: AuditReport) -> None:
    (finding,) = [f for f in on.findings if f.rule == "misaligned-scales"]
    assert finding.kernel == "_C.silu_and_mul_per_block_quant" and "(1, s72)" in finding.message


def test_a_misaligned_layout_costs_only_where_it_is_misaligned() -> None:
    reports = audit_path(ON, rows=(1, 4, 6, 64))
    bytes_of = [next(f.bytes for f in r.findings if f.rule == "misaligned-scales") for r in reports]
    assert bytes_of == [2 * 18 * 4, 0, 2 * 6 * 18 * 4, 0]


def test_without_the_fusion_nothing_comes_from_it(off: AuditReport) -> None:
    assert off.count("mutated-input-copy") == off.count("identity") == off.count("layout-copy") == 0
    assert "_C.rms_norm_per_block_quant" not in off.externs
    # the activation's fused operator is in this graph as well: what it drops and misaligns is found in both
    for rule in ("dropped-ue8m0", "misaligned-scales"):
        assert kernels_of(off, rule) == ["_C.silu_and_mul_per_block_quant"]


def test_without_the_fusion_the_neighbours_are_found_with_their_bytes(off: AuditReport) -> None:
    found = [(f.buffer, f.bytes) for f in off.findings if f.rule == "opaque-boundary"]
    assert found == [("buf11", 2 * M * K * 2), ("buf30", 2 * M * K * 2), ("buf40", 2 * M * 1536 * 2)]
    assert off.count("unfused-neighbours") == 1


def test_the_difference_reads_like_what_it_is(off: AuditReport, on: AuditReport) -> None:
    changes = {change.origin: change.count for change in audit_diff.changes(off.to_dict(), on.to_dict())}
    assert changes["_C.rms_norm_per_block_quant"] == (0, 3)
    assert changes["_C.per_token_group_fp8_quant"] == (4, 1)
    assert changes["mutated-input-copy of the input arg6_1 [s72, 7168]"] == (0, 1)
    assert changes["vllm_ir.fused_add_rms_norm _C.per_token_group_fp8_quant"] == (2, 0)
    assert "vllm.fp8_gemm_nt_op" not in changes
    text = audit_diff.render(off.to_dict(), on.to_dict(), ("off", "on"))
    assert "+  _C.rms_norm_per_block_quant" in text and "mutated-input-copy       0      1      +1" in text


def test_sizes_are_evaluated_at_the_rows_asked_for() -> None:
    small, large = audit_path(ON, rows=(1, 8192))
    assert small.programs[0].sizes == {"s72": 1} and large.programs[0].sizes == {"s72": 8192}
    copies = [next(k for k in r.kernels if k.name == "triton_poi_fused_0") for r in (small, large)]
    assert [k.bytes for k in copies] == [2 * K * 2, 2 * 8192 * K * 2]


def test_a_kernel_of_two_counts_what_each_half_reads(off: AuditReport) -> None:
    (both,) = [k for k in off.kernels if k.name == "triton_red_fused_3"]  # the two norms of the fused projection
    assert (both.bytes_read, both.bytes_written) == (M * 2048 * 2 + (1536 + 512) * 2, M * 2048 * 2)
