"""vLLM's block-FP8 products that write into a tensor they are given, DeepGEMM's and Cutlass's, as its graphs have them:
paired with their readers, with vLLM's own bits where they are not split, or left with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from shared import traced_graphs
from shared.compare import assert_bitwise, bits
from shared.inputs import activations
from shared.pass_harness import run_with_pass
from shared.unsplit_pairs import UnsplitPairs
from shared.vllm_fused_stand_ins import cutlass, deepgemm, silu_and_mul_per_block_quant
from shared.vllm_ops import per_token_group_fp8_quant
from torch.fx import Graph

import normquant as nq
from normquant.compile import Site, driver
from normquant.compile.fusions import product_pair
from normquant.compile.policy import Rules
from normquant.linear import ProductChoice, quantize_weight
from normquant.linear.split_product import split_product

M, K, N = 61, 2048, 768
WEIGHT, SCALE = quantize_weight(torch.randn(N, K, generator=torch.Generator().manual_seed(0)) / 32)
NORM_WEIGHT = torch.rand(N, generator=torch.Generator().manual_seed(1)).bfloat16() + 0.5
WRITING = ("auto_functionalized", "vllm.", "_C.")

Linear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Layer = Callable[..., tuple[torch.Tensor, ...]]
LINEARS: dict[str, tuple[Linear, str, str]] = {  # -> the layout of its input's scales, and what a pair calls
    "DeepGEMM": (deepgemm, "col_tma", "normquant_vllm::block_fp8_linear 0 0"),
    "DeepGEMM, powers of two": (
        lambda *tensors: deepgemm(*tensors, ue8m0=True),
        "col_tma",
        "normquant_vllm::block_fp8_linear 0 1",
    ),
    "Cutlass": (cutlass, "col", "normquant_vllm::cutlass_block_fp8_linear 0"),
}
every_linear = pytest.mark.parametrize(("linear", "layout", "otherwise"), LINEARS.values(), ids=LINEARS)


def gated(linear: Linear, layout: str) -> Layer:
    def fn(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        quantized = per_token_group_fp8_quant(x, layout=layout, ue8m0=layout == "col_tma")
        return silu_and_mul_per_block_quant(linear(*quantized, WEIGHT, SCALE), layout=layout)

    return fn


def normed(linear: Linear, layout: str) -> Layer:
    def fn(x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
        quantized = per_token_group_fp8_quant(x, layout=layout, ue8m0=layout == "col_tma")
        y = linear(*quantized, WEIGHT, SCALE)
        n, h = torch.ops.vllm_ir.fused_add_rms_norm(y, residual, NORM_WEIGHT, 1e-6)
        return *per_token_group_fp8_quant(n, layout=layout), h

    return fn


def split(*tensors: torch.Tensor) -> torch.Tensor:
    return split_product(*tensors, torch.bfloat16)


def rewrite(graph: Graph, products: Any) -> tuple[Site, ...]:
    rules = Rules("always", products=products)
    return driver.run(graph, rules, strict=True, fusions=driver.VLLM_FUSIONS).sites


def run(fn: Layer, *args: torch.Tensor, products: Any = "always", dynamic: bool = False) -> Any:
    return traced_graphs.run(lambda graph: rewrite(graph, products), fn, *args, dynamic=dynamic)


def pairs(left: list[str]) -> list[str]:
    return [name for name in left if name.startswith("normquant.block_fp8_linear_")]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product was measured to be faster for some number of rows, which are not those of a call on a CPU."""
    monkeypatch.setattr(product_pair, "pays", lambda *args: ProductChoice(True, "measured"))


def inputs_of(layer: Any) -> tuple[torch.Tensor, ...]:
    return (activations(M, K), activations(M, N, seed=1))[: 1 if layer is gated else 2]


@every_linear
@pytest.mark.parametrize("layer", [gated, normed])
def test_a_pair_that_splits_the_product(linear: Linear, layout: str, otherwise: str, layer: Any) -> None:
    args = inputs_of(layer)
    result, sites, left = run(layer(linear, layout), *args, dynamic=True)
    assert len(pairs(left)) == 1 and not [name for name in left if name.startswith(WRITING)]
    assert any(site.fused and "products always" in site.reason and site.k == K for site in sites)
    expected, stock = (run(layer(product, layout), *args, products="never")[0] for product in (split, linear))
    assert_bitwise(result, expected)
    assert any(not torch.equal(bits(a), bits(b)) for a, b in zip(result, stock, strict=True))  # another order of sums


@every_linear
def test_all_that_was_measured_is_a_rival_of_vllms_products(
    linear: Linear, layout: str, otherwise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rivals = []

    def pays(*args: Any) -> ProductChoice:
        rivals.append(args[-1])
        return ProductChoice(False, "slower")

    monkeypatch.setattr(product_pair, "pays", pays)
    run(gated(linear, layout), *inputs_of(gated), products="auto")
    assert rivals == [()] and otherwise


def assert_paired_with_its_own_bits(otherwise: str, fn: Layer, *args: torch.Tensor) -> None:
    """Where a pair is not split, what it runs is `otherwise` and gives the bits of the graph without pairs."""
    expected, _, left = run(fn, *args, products="never")
    assert not pairs(left) and not any(t.float().isnan().any() for t in expected)
    gm, inputs = traced_graphs.traced(fn, *args)
    rewrite(gm.graph, "auto")
    gm.recompile()
    interpreter = UnsplitPairs(gm)
    assert_bitwise(interpreter.run(*inputs), expected)
    assert interpreter.otherwise == [otherwise]


@every_linear
@pytest.mark.parametrize("layer", [gated, normed])
def test_vllms_own_product_elsewhere(linear: Linear, layout: str, otherwise: str, layer: Any, measured: None) -> None:
    assert_paired_with_its_own_bits(otherwise, layer(linear, layout), *inputs_of(layer))


def test_cutlass_in_fp16(measured: None) -> None:
    def fn(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = cutlass(*per_token_group_fp8_quant(x, layout="col"), WEIGHT, SCALE, torch.float16)
        return per_token_group_fp8_quant(y)

    otherwise = "normquant_vllm::cutlass_block_fp8_linear 1"
    assert_paired_with_its_own_bits(otherwise, fn, activations(M, K, torch.float16) / 1024)


@pytest.mark.parametrize("v2", [False, True])
@every_linear
def test_both_ways_of_functionalizing(linear: Linear, layout: str, otherwise: str, v2: bool) -> None:
    with torch._inductor.config.patch(enable_auto_functionalized_v2=v2):
        outcome = run_with_pass(
            gated_by_ours(linear, layout), activations(M, K), rules=Rules("always", products="always")
        )
    assert pairs(outcome.ops()) == ["normquant.block_fp8_linear_silu_mul_quant.default"]


def gated_by_ours(linear: Linear, layout: str, weight: torch.Tensor = WEIGHT, scale: torch.Tensor = SCALE) -> Layer:
    def fn(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q = nq.group_quant(x, spec=nq.QuantSpec(layout=layout))
        gated = nq.silu_mul_quant(linear(q.data, q.scale, weight, scale))
        return gated.data, gated.scale

    return fn


def sites_of(fn: Layer, x: torch.Tensor) -> list[Site]:
    """The sites of a graph that is not run."""
    found: list[Site] = []

    def stop(graph: Graph) -> tuple[Site, ...]:
        found.extend(rewrite(graph, "auto"))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        traced_graphs.run(stop, fn, x)
    return found


def square(data: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
    """With a weight [K, N] that is no view of [N, K]."""
    out = torch.empty(len(data), K, dtype=torch.bfloat16)
    torch.ops._C.cutlass_scaled_mm(out, data, weight, scale, weight_scale.t(), None)
    return out


def per_channel(data: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    out = torch.empty(len(data), N, dtype=torch.bfloat16)
    torch.ops._C.cutlass_scaled_mm(out, data, weight.t(), scale, torch.ones(1, N), None)
    return out


def with_bias(*tensors: torch.Tensor) -> torch.Tensor:
    return cutlass(*tensors, bias=NORM_WEIGHT)


def read_twice(*tensors: torch.Tensor) -> torch.Tensor:
    y = deepgemm(*tensors)
    return y + torch.ops.normquant.group_quant(y, nq.QuantSpec().encode())[1].sum().bfloat16()


WIDE, SQUARE = torch.cat([WEIGHT] * 2, 1), torch.zeros(K, K).to(WEIGHT.dtype)
TRANSPOSES = "no transposes of [N, K] and of [N/128, K/128]"
REFUSED: dict[str, tuple[Linear, torch.Tensor, torch.Tensor, str]] = {
    "packed scales, as on Blackwell": (deepgemm, WEIGHT, SCALE.view(torch.int32), "(6, 16) torch.int32"),
    "scales of other blocks": (deepgemm, WEIGHT, SCALE[:, :2], "(6, 2) torch.float32"),
    "padded weight": (cutlass, WIDE[:, :K], SCALE, "with stride (4096, 1)"),
    "weight that is no view": (square, SQUARE, torch.ones(16, 16), TRANSPOSES),
    "scales of channels": (per_channel, WEIGHT, SCALE, TRANSPOSES),
    "bias": (with_bias, WEIGHT, SCALE, "the product adds a bias"),
    "another reader": (read_twice, WEIGHT, SCALE, "the product is also read by aten.add"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_pair_cannot_read_stays_with_the_reason(name: str, measured: None) -> None:
    linear, weight, scale, reason = REFUSED[name]
    fn = gated_by_ours(linear, "col", weight, scale)
    (site,) = (site for site in sites_of(fn, activations(M, K)) if " -> " in site.name)
    assert not site.fused and reason in site.reason and site.k == K


def test_a_permutation_that_swaps_nothing_is_no_transpose(measured: None) -> None:
    gm, _ = traced_graphs.traced(gated_by_ours(cutlass, "col", SQUARE, torch.ones(16, 16)), activations(M, K))
    (weight,) = (
        n for n in gm.graph.nodes if n.target == torch.ops.aten.permute.default and n.meta["val"].shape[0] == K
    )
    weight.args, weight.meta["val"] = (weight.args[0], [0, 1]), weight.args[0].meta["val"]
    (site,) = rewrite(gm.graph, "auto")
    assert not site.fused and TRANSPOSES in site.reason


def into_a_part(*tensors: torch.Tensor) -> torch.Tensor:
    whole = torch.zeros(M + 1, N, dtype=torch.bfloat16)
    torch.ops.vllm.fp8_gemm_nt_op(*tensors, whole[:M], False)
    return whole


@pytest.mark.parametrize("v2", [False, True])
def test_a_product_in_a_part_of_a_tensor_is_none(v2: bool, measured: None) -> None:
    x, fn = activations(M, K), gated_by_ours(into_a_part, "col_tma")
    with torch._inductor.config.patch(enable_auto_functionalized_v2=v2):
        outcome = run_with_pass(fn, x, rules=Rules("always"))
    assert not pairs(outcome.ops())
    assert_bitwise(outcome.result, fn(x))
