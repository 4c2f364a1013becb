"""Experts in a compiled graph: the norm's kernel quantizes, and what is inside the opaque operation takes the form."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from shared import traced_graphs, vllm_experts, vllm_fused_stand_ins, vllm_ops
from shared.pass_harness import exact
from shared.vllm_experts import MoE
from shared.vllm_modules import K

from normquant.compile import Site, driver
from normquant.compile.fusions.vllm_experts import ExpertInputs
from normquant.compile.fusions.vllm_linear import QuantizedInputs
from normquant.compile.policy import Rules
from normquant.specs import VLLM, VLLM_UE8M0
from normquant.vllm import compiled_experts
from normquant.vllm.compiled_experts import CompiledExperts, experts_spec
from normquant.vllm.quantizing_readers import ExpertsReader, experts
from normquant.vllm.switches import Switches

stand_ins = vllm_experts, vllm_fused_stand_ins, vllm_ops
WEIGHT, GATE = exact(K, seed=5) + 0.5, exact(K, 4, seed=6)
ALWAYS = Switches(True, Rules("always"), check=True)


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    deep_gemm = ModuleType("vllm.utils.deep_gemm")
    deep_gemm.is_deep_gemm_e8m0_used = lambda: False  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.utils", ModuleType("vllm.utils"))
    monkeypatch.setitem(sys.modules, "vllm.utils.deep_gemm", deep_gemm)
    monkeypatch.setattr(compiled_experts, "_specs", set())
    monkeypatch.setattr(compiled_experts, "_reasons", set())
    yield


def model(moe: MoE) -> Any:
    def fn(x: torch.Tensor, residual: torch.Tensor) -> Any:
        y, residual = torch.ops.vllm_ir.fused_add_rms_norm(x, residual, WEIGHT, 1e-6)
        return moe(y, y @ GATE), residual

    return fn


def run(moe: MoE, m: int, policy: Any = "always", dynamic: bool = False) -> tuple[Any, list[Site], list[str]]:
    fusions = QuantizedInputs(), ExpertInputs(experts_spec), *driver.VLLM_FUSIONS

    def rewrite(graph: torch.fx.Graph) -> tuple[Site, ...]:
        report = driver.run(graph, Rules(policy), strict=True, fusions=fusions)
        return *report.sites, *report.others

    return traced_graphs.run(rewrite, model(moe), exact(m, K), exact(m, K, seed=2), dynamic=dynamic)


def expected(moe: MoE, m: int) -> Any:
    with torch.no_grad():
        return model(MoE("stock", None if moe._shared_experts is None else VLLM))(exact(m, K), exact(m, K, seed=2))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dynamic", [True, False])
def test_the_norm_quantizes_for_all_that_is_inside(shared: bool, dynamic: bool) -> None:
    moe = MoE("layer", VLLM.replace(layout="col_tma") if shared else None)
    CompiledExperts(moe, ALWAYS)
    first, (site,), left = run(moe, 5, dynamic=dynamic)  # each reader looks at its first input
    before = moe.quantized()
    second, *_ = run(moe, 5, dynamic=dynamic)
    for result in (first, second):
        traced_graphs.assert_equal(result, expected(moe, 5))
    assert before == moe.quantized() and all(before.values())
    assert site.fused and site.op == "add_rms_norm_quant_with_norm", site
    assert left.count("normquant.add_rms_norm_quant_with_norm.default") == 1
    assert not [name for name in left if name.startswith(("vllm", "normquant.group"))]


def test_the_layers_get_the_values_of_the_norm_in_its_memory() -> None:
    moe = MoE("layer")
    CompiledExperts(moe, ALWAYS)
    run(moe, 5)
    vllm_experts.SEEN.clear()
    run(moe, 5)
    (seen,) = vllm_experts.SEEN
    assert seen.shape == (5, K) and not hasattr(seen, "_normquant_form")  # it was taken back


def test_the_policy_may_leave_them() -> None:
    moe = MoE("layer")
    CompiledExperts(moe, ALWAYS)
    result, sites, left = run(moe, 5, "never")
    traced_graphs.assert_equal(result, expected(moe, 5))
    assert "vllm.moe_forward_shared.default" in left and not [site for site in sites if site.fused]


def test_a_shared_expert_of_another_rule_quantizes_itself() -> None:
    moe = MoE("layer", VLLM_UE8M0)
    CompiledExperts(moe, ALWAYS)
    run(moe, 5)
    before = moe.quantized()
    run(moe, 5)
    after = moe.quantized()
    assert after["routed"] == before["routed"] and after["shared"] == before["shared"] + 1


def test_experts_that_compute_something_else_are_left_and_named(caplog: Any) -> None:
    moe = MoE("layer")
    prepare = moe.routed_experts.prepare
    plain = type(prepare).prepare

    def doubled(a1: torch.Tensor, *rest: Any, **named: Any) -> Any:
        data, scale, *others = plain(prepare, a1, *rest, **named)
        return data, scale * 2, *others

    prepare.prepare = doubled
    reader = next(iter(experts(moe)))
    assert isinstance(reader, ExpertsReader)
    with caplog.at_level(logging.WARNING), torch.no_grad():
        CompiledExperts(moe, ALWAYS).read(reader, exact(5, K), None, None, 1, None, False, moe.routed_experts.config)
    (message,) = caplog.messages
    assert message == "normquant: routed_experts quantizes its input itself: 10 of 10 scales differ"
    assert prepare.prepare is doubled  # again


def test_reasons_why_experts_are_given_nothing() -> None:
    assert experts_spec() == "its experts are none that are known"
    moe = MoE("layer")
    result, sites, _ = run(moe, 5)
    assert [site.reason for site in sites] == [
        "vllm::moe_forward_shared quantizes inside: its experts are none that are known"
    ]
    traced_graphs.assert_equal(result, expected(moe, 5))
    moe.routed_experts.quant_method.moe_kernel.fused_experts.expects_unquantized_inputs = True
    CompiledExperts(moe, ALWAYS)
    assert experts_spec() == "SimpleNamespace takes bf16 and quantizes inside"
    assert "prepare" not in moe.routed_experts.prepare.__dict__


def test_a_graph_that_holds_nothing_but_the_experts_is_left() -> None:
    CompiledExperts(MoE("layer"), ALWAYS, ["vllm::moe_forward_shared"])
    assert experts_spec() == "vllm::moe_forward_shared is a graph of its own"


def test_two_rules_in_one_process_are_none() -> None:
    compiled_experts._specs.update({VLLM, VLLM_UE8M0})
    assert experts_spec() == "experts quantize by more than one rule"


def test_a_linear_outside_that_quantizes_by_another_rule_goes_first() -> None:
    moe = MoE("layer")
    CompiledExperts(moe, ALWAYS)
    weight, scale = exact(K, K, seed=3).to(torch.float8_e4m3fn), torch.ones(2, 2)

    def fn(x: torch.Tensor, residual: torch.Tensor) -> Any:
        y, residual = torch.ops.vllm_ir.fused_add_rms_norm(x, residual, WEIGHT, 1e-6)
        beside = torch.ops.vllm.dynamic_flashinfer_deepgemm_blockscale_gemm(y, weight, scale, 128, True)
        return moe(y, y @ GATE) + beside, residual

    def rewrite(graph: torch.fx.Graph) -> tuple[Site, ...]:
        fusions = QuantizedInputs(), ExpertInputs(experts_spec), *driver.VLLM_FUSIONS
        report = driver.run(graph, Rules("always"), strict=True, fusions=fusions)
        return *report.sites, *report.others

    args = exact(40, K), exact(40, K, seed=2)
    _, sites, left = traced_graphs.run(rewrite, fn, *args)
    reasons = [site.reason for site in sites if not site.fused]
    assert reasons == [
        "vllm::moe_forward_shared quantizes inside: a linear outside of it quantizes the same input by another rule"
    ]
    assert left.count("normquant.add_rms_norm_quant_with_norm.default") == 1
