"""Rules about needless copies: on a graph that has one, on the nearest that has none, and on those of every model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from shared.clean_graphs import BF16, F32, GRAPHS, compiled, empty
from shared.rule_cases import K, M, attend, cast, check, found, program, rows

from normquant.audit import AuditReport, audit

COPIES = ("identity", "cast-round-trip", "layout-copy", "mutated-input-copy")


def test_there_are_at_least_thirty() -> None:
    assert len(GRAPHS) >= 30


@pytest.mark.parametrize("name", GRAPHS)
def test_no_copy_is_found(name: str) -> None:
    _, report = compiled(name)
    assert report.launches, "nothing was generated"
    assert [(f.rule, f.kernel, f.message) for f in report.findings if f.rule in COPIES] == []
    assert report.to_dict()["notes"] == [], "everything in the generated code is understood"


class Identity(torch._inductor.custom_graph_pass.CustomGraphPass):
    """A rewrite that leaves a needless copy in front of an opaque operator, as pattern passes do."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=torch.ops.opaque_ops.attend.default):
            source = node.args[0]
            with graph.inserting_before(node):
                copy = graph.call_function(torch.ops.prims.convert_element_type.default, (source, torch.float32))
                copy.meta["val"] = source.meta["val"].float()
                back = graph.call_function(torch.ops.prims.convert_element_type.default, (copy, BF16))
                back.meta["val"] = source.meta["val"]
            node.replace_input_with(source, back)

    def uuid(self) -> None:
        return None


def test_identity_is_found_after_a_rewrite_that_left_one() -> None:
    report = audit(attend, rows, options={"post_grad_custom_post_pass": Identity()})
    (kernel,) = report.kernels
    assert found(report, "identity") == [(kernel.name, 2 * M * K * 2)]
    assert found(report, "cast-round-trip") == [(kernel.name, 2 * M * K * 2)]
    (finding,) = [f for f in report.findings if f.rule == "identity"]
    assert "through bfloat16 -> float32 -> bfloat16" in finding.message
    assert report.wasted_bytes == 2 * M * K * 2, "a launch with two findings is wasted once"
    assert report.count("identity") == 1 and audit(attend, rows).count("identity") == 0


@pytest.mark.parametrize(
    "copy",
    [lambda x: attend(x * 2).clone(), lambda x: (attend(x), x.clone()), lambda x: x.copy_(attend(x))],
    ids=["a result of its own", "a copy that is returned", "an update of an input"],
)
def test_copies_that_the_program_asks_for_are_no_finding(copy: Any) -> None:
    report = audit(copy, rows)
    assert [f for f in report.findings if f.severity == "error"] == []


def test_layout_copy() -> None:
    report = audit(lambda x: attend(attend(x).t().contiguous()), rows)
    (kernel,) = report.kernels
    assert found(report, "layout-copy") == [(kernel.name, 2 * M * K * 2)]
    packed = audit(lambda x: attend(attend(x)[:, :256].contiguous()), rows)
    assert found(packed, "layout-copy") == [(packed.kernels[0].name, 2 * M * 256 * 2)]
    assert audit(lambda x: attend(attend(x).t().contiguous() * 2), rows).count("layout-copy") == 0


@pytest.mark.parametrize("moved", ["flip", "expand", "roll", "gather"])
def test_other_moves_are_no_layout_copy(moved: str) -> None:
    moves = {
        "flip": lambda x: x.flip(-1),
        "expand": lambda x: x[:, None].expand(-1, 4, -1).contiguous(),
        "roll": lambda x: x.roll(3, -1),
        "gather": lambda x: x[x[:, 0].long()],
    }
    report = audit(lambda x: attend(moves[moved](attend(x))), rows)
    assert report.kernels and report.count("layout-copy") == report.count("identity") == 0


def test_the_kernel_of_the_regression_bf16_to_fp32_to_bf16_with_a_permute() -> None:
    """vLLM #37832: a kernel that converts and permutes, between two opaque calls."""
    report = audit(lambda x: attend(attend(x).float().t().contiguous().to(BF16)), rows)
    (kernel,) = report.kernels
    assert found(report, "layout-copy") == found(report, "cast-round-trip") == [(kernel.name, 2 * M * K * 2)]


def test_a_rounding_is_no_identity_if_the_code_rounds() -> None:
    """Inductor drops fp32 -> bf16 -> fp32 unless it is told to keep it: the kernel that is left is a plain copy."""

    def round_to_bf16(x: torch.Tensor) -> torch.Tensor:
        return attend(attend(x).to(BF16).float())

    def inputs() -> tuple[torch.Tensor, ...]:
        return (empty(M, K, dtype=F32),)

    assert audit(round_to_bf16, inputs).count("identity") == 1
    kept = audit(round_to_bf16, inputs, options={"emulate_precision_casts": True})
    assert kept.kernels and kept.count("identity") == kept.count("cast-round-trip") == 0


def test_mutated_input_copy() -> None:
    def in_place(x: torch.Tensor) -> torch.Tensor:
        y = x.clone()
        torch.ops.opaque_ops.norm_(y)
        return attend(y)

    report = audit(in_place, rows)
    (kernel,) = report.kernels
    assert found(report, "mutated-input-copy") == [(kernel.name, 2 * M * K * 2)]
    assert "opaque_ops.norm_" in report.findings[0].message and report.count("identity") == 0


def test_cast_round_trip_across_two_kernels() -> None:
    n = M * K
    there = cast(0, "x", "wide", ("bfloat16", "float32"), (2 * n, 4 * n))
    back = cast(1, "wide", "out", ("float32", "bfloat16"), (4 * n, 2 * n))
    assert check(program(there, back, wide="float32"))["cast-round-trip"] == [("triton_1", 12 * n)]
    rounding = cast(0, "x", "narrow", ("float32", "bfloat16"), (4 * n, 2 * n))
    widening = cast(1, "narrow", "out", ("bfloat16", "float32"), (2 * n, 4 * n))
    assert "cast-round-trip" not in check(program(rounding, widening, x="float32", out="float32"))


def test_the_residual_copy_is_found(on: AuditReport) -> None:
    (finding,) = [f for f in on.findings if f.rule == "mutated-input-copy"]
    assert finding.kernel == "triton_poi_fused_0"
    assert finding.bytes == 2 * M * 7168 * 2
    assert "arg6_1 [s72, 7168]" in finding.message and "_C.rms_norm_per_block_quant" in finding.message
    assert on.count("identity") == 0, "one kernel, one name for what it is"
