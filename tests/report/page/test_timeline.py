"""The launches of all programs of a report, in order, by class."""

from __future__ import annotations

import copy

import pytest
from shared.generated_code import ON

from normquant.audit import audit_path
from normquant.report.page.timeline import CLASSES, kind, returned, timeline


@pytest.mark.parametrize(
    ("name", "kind_of_launch", "expected"),
    [
        ("aten.mm", "extern", "product"),
        ("aten.addmm", "extern", "product"),
        ("vllm.fp8_gemm_nt_op", "extern", "product"),
        ("normquant.block_fp8_linear", "extern", "product"),
        ("vllm.moe_forward_shared", "extern", "product"),
        ("aten.convolution", "extern", "product"),
        ("aten._scaled_dot_product_flash_attention", "extern", "attention"),
        ("vllm.unified_attention_with_output", "extern", "attention"),
        ("normquant.add_rms_norm_quant", "extern", "fused"),
        ("_C.per_token_group_fp8_quant", "extern", "fused"),
        ("aten.sort", "extern", "opaque"),
        ("triton_per_fused_mm_0", "persistent_reduction", "reduction"),
        ("triton_poi_fused_0", "pointwise", "pointwise"),
        ("triton_for_fused_0", "foreach", "pointwise"),
        ("triton_tem_fused_mm_0", "template", "template"),
        ("my_kernel", "user", "template"),
    ],
)
def test_the_class_of_a_launch(name: str, kind_of_launch: str, expected: str) -> None:
    assert kind({"name": name, "kind": kind_of_launch}) == expected and expected in CLASSES


def test_programs_follow_each_other() -> None:
    report = audit_path(ON, rows=(64,))[0].to_dict()
    first = report["programs"][0]
    second = copy.deepcopy(first) | {"number": 1, "name": "second"}
    one, two = timeline(report), timeline(report | {"programs": [first, second]})
    assert [step.first for step in two.steps] == ([True] + [False] * 13) * 2
    moved = [(p.source if p.source is None else p.source + 14, p.target + 14, p.buffer, p.bytes) for p in one.passed]
    assert [(p.source, p.target, p.buffer, p.bytes) for p in two.passed[len(one.passed) :]] == moved
    assert [len(step.findings) for step in two.steps[:14]] == [len(step.findings) for step in one.steps]
    assert not any(step.findings for step in two.steps[14:])


def test_what_is_returned() -> None:
    steps = timeline(audit_path(ON, rows=(64,))[0].to_dict()).steps
    outputs = set(steps[0].program["outputs"])
    assert {name for step in steps for name in returned(step)} == outputs & {n for s in steps for n in s.data["writes"]}


def test_names_that_differ_in_their_number_are_of_one_origin() -> None:
    step = timeline(audit_path(ON, rows=(64,))[0].to_dict()).steps[2]
    renamed = {**step.data, "name": "triton_poi_fused_17", "aten": []}
    plain = {**step.data, "aten": []}
    assert type(step)(step.program, renamed, (), "pointwise", False).origin == ("pointwise", "triton_poi_fused")
    assert type(step)(step.program, plain, (), "pointwise", False).origin == ("pointwise", "triton_poi_fused")
