"""Rules about scales: on programs made by hand, and on a layer that vLLM generated."""

from __future__ import annotations

import pytest
from shared.generated_code import ON
from shared.rule_cases import check, program

from normquant.audit import AuditReport, audit_path
from normquant.audit.program import Access, Extern, View


def call(position: int, name: str, *arguments: str, view: View | None = None) -> Extern:
    views = {1: view} if view else {}
    return Extern(position, name, (Access("x", 8),), (Access("out", 8),), arguments=arguments, views=views)


ROUNDED = ("x", "q", "s", "128", "1e-10", "-448.0", "448.0", "True", "True", "True")
PLAIN = (*ROUNDED[:7], "False", "True", "True")


def test_dropped_ue8m0_within_and_beside_a_program() -> None:
    rounds, drops = (call(i, "_C.per_token_group_fp8_quant", *a) for i, a in enumerate((ROUNDED, PLAIN)))
    fused = call(0, "_C.rms_norm_per_block_quant", "q", "x", "w", "s", "1e-06", "None", "None", "128", "True")
    assert check(program(rounds, drops))["dropped-ue8m0"] == [(drops.name, 0)]
    assert check(program(fused), program(rounds))["dropped-ue8m0"] == [(fused.name, 0)], "another part rounds"
    assert "dropped-ue8m0" not in check(program(fused, drops)), "nobody rounds"
    assert "dropped-ue8m0" not in check(program(rounds, call(1, "normquant.rms_norm_quant", "x", "'ue8m0'")))
    assert "dropped-ue8m0" not in check(program(rounds, call(1, "normquant.rope_last", "x", "'fp32'"))), "no scales"


@pytest.mark.parametrize(
    ("shape", "stride", "finds"),
    [
        (("s0", "56"), ("1", "s0"), True),
        (("s0", "56"), ("1", "4*((s0 + 3)//4)"), False),
        (("s0", "56"), ("1", "(-4)*(s0 // (-4))"), False),
        (("s0", "56"), ("56", "1"), True),
        (("64", "56"), ("1", "64"), False),
        (("66", "56"), ("1", "66"), True),
        (("s0", "1"), ("1", "s0"), False),
    ],
)
def test_misaligned_scales(shape: tuple[str, ...], stride: tuple[str, ...], finds: bool) -> None:
    gemm = call(0, "vllm.fp8_gemm_nt_op", "q", "s", view=View("x", shape, stride))
    assert ("misaligned-scales" in check(program(gemm))) is finds


def kernels_of(report: AuditReport, rule: str) -> list[str]:
    return [finding.kernel for finding in report.findings if finding.rule == rule]


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
