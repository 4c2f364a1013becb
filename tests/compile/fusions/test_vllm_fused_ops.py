"""vLLM's own fused ops become ours, with their arithmetic, and without what they cost around them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from shared import traced_graphs
from shared.pass_harness import exact
from shared.traced_graphs import assert_equal, rewrite
from shared.vllm_fused_stand_ins import SCALE_STRIDES, deepgemm, rms_norm_per_block_quant, silu_and_mul_per_block_quant
from torch._inductor.utils import run_and_get_code

from normquant.compile.fusions import vllm_fused_ops
from normquant.spec import QuantSpec

M, K = 5, 512
WEIGHT = exact(K, seed=2) + 0.5


def run(fn: Any, *args: torch.Tensor, policy: Any = "always", dynamic: bool = False) -> tuple:
    return traced_graphs.run(lambda graph: rewrite(graph, vllm_fused_ops.find, policy), fn, *args, dynamic=dynamic)


def ours(left: list[str]) -> list[str]:
    return [name.removeprefix("normquant.").removesuffix(".default") for name in left if name.startswith("normquant.")]


def add_norm(x: torch.Tensor, r: torch.Tensor, **options: Any) -> tuple[torch.Tensor, ...]:
    residual = r * 0.5  # made in the graph, as in a model
    return *rms_norm_per_block_quant(x, WEIGHT, residual, **options), residual


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("layout", ["row", "col", "col_tma"])
def test_a_norm(layout: str, group: int, dynamic: bool) -> None:
    def fn(x):
        return rms_norm_per_block_quant(x, WEIGHT, group=group, layout=layout)

    result, (site,), left = run(fn, exact(M, K), dynamic=dynamic)
    assert site.fused and (site.op, site.kernels_saved) == ("rms_norm_quant", 0)
    spec = QuantSpec.decode(site.spec)
    assert (spec.layout, spec.group, spec.floor, spec.scale_floor) == (layout, group, 0.0, 1 / (448 * 512))
    assert ours(left) == ["rms_norm_quant"] and not [name for name in left if "auto_functionalized" in name]
    assert_equal(result, fn(exact(M, K)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["row", "col_tma"])
def test_the_residual_is_a_result_and_not_changed(layout: str, dtype: torch.dtype) -> None:
    def fn(x, r):
        residual = r * 0.5
        return *rms_norm_per_block_quant(x, WEIGHT.to(dtype), residual, layout=layout), residual

    args = exact(M, K, dtype=dtype), exact(M, K, dtype=dtype, seed=1)
    result, (site,), left = run(fn, *args, dynamic=True)
    assert site.fused and (site.op, site.kernels_saved) == ("add_rms_norm_quant", 1)
    assert site.bytes_saved == 2 * M * K * 2
    assert ours(left) == ["add_rms_norm_quant"]
    assert not [name for name in left if "auto_functionalized" in name or "copy" in name or "clone" in name]
    assert_equal(result, fn(*args))


def test_leading_dimensions() -> None:
    args = exact(2, 3, K), exact(2, 3, K, seed=1)
    result, (site,), _ = run(add_norm, *args)
    assert site.fused and site.m == "6"
    assert_equal(result, add_norm(*args))


def test_small_values_meet_the_floor_of_the_scale() -> None:
    def fn(x):
        return rms_norm_per_block_quant(x, WEIGHT * 2.0**-12)

    x = exact(M, K)
    x[0] = 0
    result, _, _ = run(fn, x)
    assert (result[1] == 1 / (448 * 512)).all()
    assert_equal(result, fn(x))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("layout", ["row", "col", "col_tma"])
def test_a_gated_product(layout: str, dynamic: bool) -> None:
    def fn(x):
        return silu_and_mul_per_block_quant(x, layout=layout)

    result, (site,), left = run(fn, exact(M, 2 * K), dynamic=dynamic)
    assert site.fused and (site.op, site.k, site.kernels_saved) == ("silu_mul_quant", K, 0)
    spec = QuantSpec.decode(site.spec)
    assert (spec.layout, spec.rounding) == (layout, "none")  # the layout of the graph, whoever reads it
    assert ours(left) == ["silu_mul_quant"]
    assert_equal(result, fn(exact(M, 2 * K)))


def gemm_weight() -> torch.Tensor:
    return exact(128, K, seed=3).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("dynamic", [False, True])
def test_scales_that_only_deepgemm_reads_are_aligned_for_it(dynamic: bool) -> None:
    def fn(x, w):
        return deepgemm(*silu_and_mul_per_block_quant(x, layout="col"), w)

    args = exact(M, 2 * K), gemm_weight()
    result, (site,), left = run(fn, *args, dynamic=dynamic)
    assert QuantSpec.decode(site.spec).layout == "col_tma"
    assert (site.kernels_saved, site.bytes_saved) == (1, 2 * 8 * (K // 128) * 4)
    assert ours(left) == ["silu_mul_quant"]
    assert_equal([result], [fn(*args)])


def test_inductor_hands_the_aligned_scales_on_as_they_are() -> None:
    def fn(x, w):
        return deepgemm(*silu_and_mul_per_block_quant(x, layout="col"), w)

    args = exact(M, 2 * K), gemm_weight()
    torch._dynamo.reset()
    torch._dynamo.mark_dynamic(args[0], 0)
    SCALE_STRIDES.clear()
    with torch.no_grad(), torch._inductor.config.patch(enable_auto_functionalized_v2=False):
        result, code = run_and_get_code(
            torch.compile(fn, options={"post_grad_custom_post_pass": traced_graphs.Pass(vllm_fused_ops.find)}), *args
        )
    assert SCALE_STRIDES == [(1, 8)]
    assert "normquant.silu_mul_quant" in code[0] and "copy" not in code[0].partition("def call(")[2]
    assert_equal([result], [fn(*args)])


def test_scales_that_someone_else_reads_too_keep_their_layout() -> None:
    def fn(x, w):
        data, scale = silu_and_mul_per_block_quant(x, layout="col")
        return deepgemm(data, scale, w), scale

    args = exact(M, 2 * K), gemm_weight()
    result, (site,), _ = run(fn, *args)
    assert QuantSpec.decode(site.spec).layout == "col"
    assert_equal(result, fn(*args))


def test_the_report_says_where_powers_of_two_were_lost() -> None:
    for ue8m0 in (False, True):

        def fn(x, w, ue8m0=ue8m0):
            return deepgemm(*rms_norm_per_block_quant(x, WEIGHT, layout="col_tma"), w, ue8m0=ue8m0)

        args = exact(M, K), gemm_weight()
        result, (site,), _ = run(fn, *args)
        assert site.fused and ("powers of two" in site.reason) == ue8m0
        assert_equal([result], [fn(*args)])


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (lambda x: rms_norm_per_block_quant(x, WEIGHT, bound=torch.ones(1)), "upper bound"),
        (lambda x: rms_norm_per_block_quant(x, WEIGHT, layout="col", transposed=False), "are written as rows"),
        (lambda x: rms_norm_per_block_quant(x, WEIGHT, transposed=True), "are written as columns"),
        (lambda x: rms_norm_per_block_quant(x, WEIGHT, group=256), "group is 256"),
        (
            lambda x: rms_norm_per_block_quant(x.float(), WEIGHT),
            "x has dtype torch.float32; accepted: bfloat16, float16",
        ),
        (lambda x: rms_norm_per_block_quant(x.t().contiguous().t(), WEIGHT), "the last stride must be 1"),
    ],
)
def test_what_the_kernels_lack_stays(fn: Any, words: str) -> None:
    result, (site,), left = run(fn, exact(M, K))
    assert not site.fused and words in site.reason and "_C::rms_norm_per_block_quant: " in site.reason, site.reason
    assert ours(left) == []
    assert_equal(result, fn(exact(M, K)))


def test_the_policy_decides() -> None:
    args = exact(M, K), exact(M, K, seed=1)
    for policy, words in (("never", "policy never"), ("auto", "no measurements on cpu")):
        result, (site,), left = run(add_norm, *args, policy=policy)
        assert words in site.reason and ours(left) == []
        assert_equal(result, add_norm(*args))
    _, (site,), _ = run(add_norm, *args, policy="opaque-norm")
    assert site.fused
