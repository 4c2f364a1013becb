"""vLLM's default linears on Hopper: their quantization comes out and is fused, with the bits of the operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from shared import traced_graphs, vllm_fused_stand_ins, vllm_ops
from shared.pass_harness import exact
from torch.fx import Graph

from normquant import specs
from normquant.compile import Site, driver
from normquant.compile.fusions.vllm_linear import QuantizedInputs
from normquant.compile.policy import Rules
from normquant.spec import QuantSpec

K, N = 512, 256
PRODUCT = "normquant_vllm.block_fp8_linear.default"
FUSED = "normquant.add_rms_norm_quant.default"
stand_ins = vllm_fused_stand_ins, vllm_ops  # imported for the operations that they define


def weights(n: int = N, k: int = K) -> tuple[torch.Tensor, torch.Tensor]:
    scale = torch.rand((n + 127) // 128, k // 128, generator=torch.Generator().manual_seed(1)) + 0.5
    return exact(n, k, seed=3).to(torch.float8_e4m3fn), scale


WEIGHT, SCALE = weights()
NORM_WEIGHT = exact(K, seed=5) + 0.5


def dynamic_linear(x: torch.Tensor, e8m0: bool = True) -> torch.Tensor:
    return torch.ops.vllm.dynamic_flashinfer_deepgemm_blockscale_gemm(x, WEIGHT, SCALE, 128, e8m0)


def flashinfer_linear(x: torch.Tensor, e8m0: bool = True) -> torch.Tensor:
    return torch.ops.vllm.flashinfer_fp8_blockscale_gemm(x, WEIGHT, SCALE)


def rewrite(graph: Graph, policy: Any = "always", **settings: Any) -> tuple[Site, ...]:
    fusions = QuantizedInputs(**settings), *driver.VLLM_FUSIONS
    report = driver.run(graph, Rules(policy), strict=True, fusions=fusions)
    return *report.sites, *report.others


def run(fn: Any, *args: torch.Tensor, dynamic: bool = False, **settings: Any) -> tuple[Any, list[Site], list[str]]:
    return traced_graphs.run(lambda graph: rewrite(graph, **settings), fn, *args, dynamic=dynamic)


def normed(x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.vllm_ir.fused_add_rms_norm(x, residual, NORM_WEIGHT, 1e-6)


@pytest.mark.parametrize(
    ("m", "dynamic"), [(1, False), (5, False), (40, False), (5, True), (31, True), (32, True), (40, True)]
)
@pytest.mark.parametrize("e8m0", [False, True])
@pytest.mark.parametrize("linear", [dynamic_linear, flashinfer_linear])
def test_a_norm_in_front_is_one_kernel_with_its_quantization(m: int, linear: Any, e8m0: bool, dynamic: bool) -> None:
    def fn(x, residual):
        y, residual = normed(x, residual)
        return linear(y, e8m0), residual

    args = exact(m, K), exact(m, K, seed=2)
    result, (site,), left = run(fn, *args, dynamic=dynamic)
    assert site.fused and site.op == "add_rms_norm_quant", site
    assert left.count(FUSED) == left.count(PRODUCT) == 1
    assert not [name for name in left if name.startswith(("vllm", "normquant.group"))]
    traced_graphs.assert_equal(result, fn(*args))


def test_the_rule_depends_on_the_rows_of_the_call_in_one_graph() -> None:
    def fn(x, residual):
        return dynamic_linear(normed(x, residual)[0])

    _, (site,), _ = run(fn, exact(40, K), exact(40, K, seed=2), dynamic=True)
    spec = QuantSpec.decode(site.spec)
    assert spec.few_rows == 32 and site.m != "40"
    assert spec.at(31).divide == specs.FLASHINFER_LINEAR.divide and spec.at(32).scale == "ue8m0"


@pytest.mark.parametrize("m", [3, 40])
def test_what_no_norm_feeds_is_quantized_by_our_kernel(m: int) -> None:
    x = exact(m, 2, K // 2)  # the attention's output has heads

    def fn(x):
        return dynamic_linear(x.flatten(1) * 1.0)

    result, (site,), left = run(fn, x, dynamic=True)
    assert site.fused and site.op == "group_quant" and "inside the linear kernel" in site.reason
    assert left.count("normquant.group_quant.default") == left.count(PRODUCT) == 1
    traced_graphs.assert_equal([result], [fn(x)])


def test_two_linears_of_one_norm_share_its_kernel() -> None:
    def fn(x, residual):
        y, residual = normed(x, residual)
        return dynamic_linear(y), dynamic_linear(y), y, residual

    args = exact(7, K), exact(7, K, seed=2)
    result, (site,), left = run(fn, *args, dynamic=True)
    assert site.fused and site.op == "add_rms_norm_quant_with_norm" and left.count(PRODUCT) == 2
    traced_graphs.assert_equal(result, fn(*args))


def test_zeros_keep_the_scale_of_the_kernel() -> None:
    x = exact(4, K)
    x[1] = 0
    result, (site,), _ = run(dynamic_linear, x)
    assert site.fused
    traced_graphs.assert_equal([result], [dynamic_linear(x)])


def test_batch_invariant_engines_take_deepgemm_alone() -> None:
    _, (site,), _ = run(dynamic_linear, exact(4, K), deepgemm_alone=True)
    assert QuantSpec.decode(site.spec) == specs.VLLM_UE8M0.replace(layout="col_tma")


@pytest.mark.parametrize("policy", ["never", "native", "auto"])
def test_other_policies_leave_the_operator(policy: str) -> None:
    result, (site,), left = run(dynamic_linear, exact(4, K), policy=policy)
    assert not site.fused and "vllm.dynamic_flashinfer_deepgemm_blockscale_gemm.default" in left
    traced_graphs.assert_equal([result], [dynamic_linear(exact(4, K))])


def test_a_flashinfer_without_fp8_inputs_is_left_with_the_reason() -> None:
    result, (site,), left = run(dynamic_linear, exact(4, K), lacks=lambda: "FlashInfer is not installed")
    assert not site.fused and site.reason.endswith("quantizes inside: FlashInfer is not installed")
    assert not [name for name in left if name.startswith("normquant")]
    traced_graphs.assert_equal([result], [dynamic_linear(exact(4, K))])


def test_a_shape_that_the_kernel_refuses_is_left_with_the_reason() -> None:
    weight, scale = weights(n=96)

    def fn(x):
        return torch.ops.vllm.flashinfer_fp8_blockscale_gemm(x, weight, scale)

    result, (site,), _ = run(fn, exact(4, K))
    assert not site.fused and "N 96" in site.reason
    traced_graphs.assert_equal([result], [fn(exact(4, K))])
