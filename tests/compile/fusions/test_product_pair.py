"""Products and their readers become pairs where that was measured, or is asked for, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from shared import traced_graphs
from shared.compare import assert_bitwise
from shared.fake_group import fake_group
from shared.inputs import activations
from shared.pass_harness import Outcome, run_with_pass

import normquant as nq
from normquant.compile import FusionReport, driver
from normquant.compile.fusions import product_pair
from normquant.compile.policy import Rules
from normquant.linear import ProductChoice
from normquant.linear.split_product import split_product

K, N = 512, 768
WEIGHT, SCALE = nq.quantize_weight(torch.randn(N, K, generator=torch.Generator().manual_seed(0)))
NORM_WEIGHT = torch.rand(N, generator=torch.Generator().manual_seed(1)).bfloat16() + 0.5
SPEC = nq.QuantSpec(layout="col_tma")


def product(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return nq.block_fp8_linear(nq.group_quant(x, spec=SPEC), WEIGHT, SCALE, bias)


def gated(x: torch.Tensor, limit: float | None = None) -> tuple[torch.Tensor, ...]:
    q = nq.silu_mul_quant(product(x), spec=SPEC, limit=limit)
    return q.data, q.scale


def normed(x: torch.Tensor, residual: torch.Tensor, first: bool = False) -> tuple[torch.Tensor, ...]:
    h = product(x) + residual if first else residual + product(x)
    q = nq.group_quant(torch.nn.functional.rms_norm(h, (N,), NORM_WEIGHT, 1e-6), spec=SPEC)
    return q.data, q.scale, h


def split(x: torch.Tensor) -> torch.Tensor:
    """What the product of x's rows is where it is split."""
    q = nq.group_quant(x, spec=SPEC)
    return split_product(q.data, q.scale, WEIGHT, SCALE, torch.bfloat16)


def run(fn: Callable[..., Any], *args: Any, products: Any = "always", policy: Any = "always") -> Outcome:
    return run_with_pass(fn, *args, rules=Rules(policy, products=products))


def pairs(outcome: Outcome) -> list[str]:
    return [name for name in outcome.ops() if name.startswith("normquant.block_fp8_linear_")]


@pytest.mark.parametrize("limit", [None, 0.3])
def test_a_gated_product(limit: float | None) -> None:
    x = activations(5, K)
    outcome = run(lambda x: gated(x, limit), x)
    assert pairs(outcome) == ["normquant.block_fp8_linear_silu_mul_quant.default"]
    assert outcome.site.fused and "products always" in outcome.site.reason and outcome.site.k == K
    q = nq.silu_mul_quant(split(x), spec=SPEC, limit=limit)
    assert_bitwise(outcome.result, (q.data, q.scale))


@pytest.mark.parametrize("first", [False, True])
def test_a_norm_that_the_pass_has_just_fused(first: bool) -> None:
    x, residual = activations(5, K), activations(5, N, seed=1)
    outcome = run(normed, x, residual, first)
    assert pairs(outcome) == ["normquant.block_fp8_linear_add_rms_norm_quant.default"]
    q, h = nq.add_rms_norm_quant(split(x), residual, NORM_WEIGHT, 1e-6, spec=nq.QuantSpec.decode(outcome.sites[0].spec))
    assert_bitwise(outcome.result, (q.data, q.scale, h))


def test_more_dimensions_are_views() -> None:
    x = activations(6, K).view(2, 3, K)
    assert len(pairs(run(gated, x))) == 1


@pytest.mark.parametrize(("policy", "products"), [("always", "auto"), ("always", "never"), ("never", "always")])
def test_other_choices_leave_the_product(policy: str, products: str) -> None:
    x, residual = activations(5, K), activations(5, N, seed=1)
    outcome = run(normed, x, residual, policy=policy, products=products)
    assert pairs(outcome) == [] and len(outcome.sites) == 1
    assert_bitwise(outcome.result, normed(x, residual))


@pytest.mark.parametrize("policy", ["auto", "always"])
def test_by_default_those_that_were_measured(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def pays(*args: Any) -> ProductChoice:
        seen.append(args)
        return ProductChoice(True, "measured: M 1..16: normquant 7.9 us, scaled_mm 14.2 us")

    monkeypatch.setattr(product_pair, "pays", pays)
    x = activations(5, K)
    outcome = run(gated, x, policy=policy, products="auto")
    assert [(*args[:3], args[4]) for args in seen] == [("silu_mul_quant", K, N, 5)]
    assert outcome.site.fused and "normquant 7.9 us" in outcome.site.reason
    assert pairs(outcome)
    assert_bitwise(outcome.result, gated(x))  # at the call, this CPU has no measurements


def test_one_graph_for_every_number_of_rows() -> None:
    outcome = run_with_pass(gated, activations(5, K), rules=Rules("always", products="always"), dynamic=True)
    assert len(pairs(outcome)) == 1 and outcome.site.m.startswith("s")


def twice(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = product(x)
    q = nq.silu_mul_quant(y, spec=SPEC)
    return q.data, q.scale, y + 1


def other_rows(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    q = nq.group_quant(product(x).view(-1, N // 2), spec=SPEC)
    return q.data, q.scale


def with_bias(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    q = nq.group_quant(product(x, NORM_WEIGHT), spec=SPEC)
    return q.data, q.scale


@pytest.mark.parametrize("fn", [twice, other_rows, with_bias])
def test_what_is_no_pair_stays(fn: Callable[..., Any]) -> None:
    x = activations(5, K)
    outcome = run(fn, x)
    assert pairs(outcome) == []
    assert_bitwise(outcome.result, fn(x))


def test_a_reason_where_a_measured_pair_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_pair, "pays", lambda *args: ProductChoice(True, "measured"))
    for fn, reason in (
        (twice, "also read by aten.add"),
        (other_rows, "rows of 384 values are read of a product with 768"),
    ):
        site = run(fn, activations(5, K)).site
        assert not site.fused and reason in site.reason


def test_a_product_of_torch_is_measured_against_what_torch_can_call(monkeypatch: pytest.MonkeyPatch) -> None:
    rivals = []

    def pays(*args: Any) -> ProductChoice:
        rivals.append(args[-1])
        return ProductChoice(False, "slower")

    monkeypatch.setattr(product_pair, "pays", pays)
    run(gated, activations(5, K), products="auto")
    assert rivals == [("scaled_mm",)]


def reduced(x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
    h = funcol.all_reduce(product(x), "sum", dist.group.WORLD) + residual
    q = nq.group_quant(torch.nn.functional.rms_norm(h, (N,), NORM_WEIGHT, 1e-6), spec=SPEC)
    return q.data, q.scale, h


def reduced_without_residual(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(funcol.all_reduce(product(x), "sum", dist.group.WORLD), (N,), NORM_WEIGHT, 1e-6)


def added_behind(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    h = funcol.all_reduce(2 * residual, "sum", dist.group.WORLD) + product(x)
    return torch.nn.functional.rms_norm(h, (N,), NORM_WEIGHT, 1e-6)


def reduced_and_read(x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = product(x)
    return *reduced_of(y, residual), y + 1


def reduced_of(y: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
    h = funcol.all_reduce(y, "sum", dist.group.WORLD) + residual
    return torch.nn.functional.rms_norm(h, (N,), NORM_WEIGHT, 1e-6), h


def of_group(fn: Callable[..., Any], products: Any = "always") -> tuple[FusionReport, list[str]]:
    """What the pass makes of a graph with an all-reduce; its values are tested in distributed/test_compiled."""
    with fake_group():
        gm, _ = traced_graphs.traced(fn, activations(5, K), activations(5, N, seed=1))
        rules = Rules("always", products=products)
        report = driver.run(gm.graph, rules, strict=True, fusions=driver.ALL_REDUCE_FUSIONS)
        gm.graph.lint()
    targets = [node.target for node in gm.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    return report, [target._opname for target in targets if "rms_norm" in target._opname]


@pytest.mark.parametrize(
    ("fn", "reader"),
    [(reduced, "all_reduce_add_rms_norm_quant"), (reduced_without_residual, "all_reduce_rms_norm")],
)
def test_a_row_parallel_product_and_the_op_of_its_group(fn: Callable[..., Any], reader: str) -> None:
    report, left = of_group(fn)
    assert left == [f"block_fp8_linear_{reader}"]
    site = report.sites[-1]
    assert site.fused and site.name.endswith(f"-> {reader}") and "products always" in site.reason
    for products in ("auto", "never"):  # no table has measurements of several GPUs
        report, left = of_group(fn, products)
        assert left == [reader] and len(report.sites) == 1


@pytest.mark.parametrize(
    ("fn", "left"),
    [(added_behind, "all_reduce_add_rms_norm"), (reduced_and_read, "all_reduce_add_rms_norm")],
)
def test_a_product_that_is_not_the_part_alone_stays(fn: Callable[..., Any], left: str) -> None:
    assert of_group(fn)[1] == [left]


def test_the_switch_is_part_of_the_identity() -> None:
    assert len({Rules(products=products).identity for products in ("auto", "always", "never")}) == 3
    with pytest.raises(ValueError, match="products is 'sometimes'; accepted: 'auto', 'always', 'never'"):
        nq.inductor_options(products="sometimes")


def test_compiled_by_inductor() -> None:
    x = activations(5, K)
    options = nq.inductor_options("always", products="always", strict=True)
    with torch.no_grad():
        compiled = torch.compile(gated, options=options)(x)
    q = nq.silu_mul_quant(split(x), spec=SPEC)
    assert_bitwise(compiled, (q.data, q.scale))
