"""vLLM's fusion cases: its IR norms, its quantization ops as auto_functionalized leaves them, ue8m0 included."""

from __future__ import annotations

import pytest
import torch

from normquant.compile.policy import Rules
from normquant.spec import QuantSpec

from . import vllm_ops
from .harness import assert_same, exact, run_with_pass

M, K = 5, 512
ARGS = (exact(M, K), exact(M, K, seed=1), exact(K, seed=2) + 0.5)


def norm(x, w, eps=1e-6):
    return torch.ops.vllm_ir.rms_norm(x, w, eps)


def add_norm(x, r, w, eps=1e-6):
    return torch.ops.vllm_ir.fused_add_rms_norm(x, r, w, eps)


@pytest.fixture(params=[False, True], ids=["functionalized v1", "functionalized v2"])
def functionalization(request):
    with torch._inductor.config.patch(enable_auto_functionalized_v2=request.param):
        yield "v2" if request.param else "v1"


@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("ue8m0", [False, True], ids=["fp32", "ue8m0"])
@pytest.mark.parametrize("layout", ["row", "col", "col_tma"])
@pytest.mark.parametrize("residual", [False, True], ids=["norm", "add norm"])
def test_norm_and_quantization_are_one_op(residual: bool, layout: str, ue8m0: bool, group: int) -> None:
    def fn(x, r, w):
        y, h = add_norm(x, r, w) if residual else (norm(x, w), x)
        return *vllm_ops.per_token_group_fp8_quant(y, group, ue8m0=ue8m0, layout=layout), h * 1.0

    with torch._inductor.config.patch(enable_auto_functionalized_v2=False):  # as vLLM sets it
        outcome = run_with_pass(fn, *ARGS)
    assert outcome.site.fused, outcome.site.reason
    spec = QuantSpec.decode(outcome.site.spec)
    assert (spec.layout, spec.is_ue8m0, spec.group, spec.rounding) == (layout, ue8m0, group, "twice")
    assert outcome.ops() == [f"normquant.{'add_' * residual}rms_norm_quant.default"]
    assert outcome.ops("auto_functionalized", "vllm_ir") == []
    expected = fn(*ARGS)
    assert_same(outcome.result, expected)
    assert outcome.result[1].stride() == expected[1].stride()


@pytest.mark.parametrize("layout", ["row", "col_tma"])
def test_both_ways_of_functionalizing(functionalization: str, layout: str) -> None:
    def fn(x, r, w):
        return vllm_ops.per_token_group_fp8_quant(norm(x, w), layout=layout)

    outcome = run_with_pass(fn, *ARGS)
    assert outcome.site.fused
    assert_same(outcome.result, fn(*ARGS))


def test_scales_written_through_a_view_stay(functionalization: str) -> None:
    def fn(x, r, w):
        return vllm_ops.per_token_group_fp8_quant(norm(x, w), layout="col")

    outcome = run_with_pass(fn, *ARGS)
    assert outcome.site.fused or "view of another tensor" in outcome.site.reason
    assert outcome.site.fused == (functionalization == "v1")
    assert_same(outcome.result, fn(*ARGS))


def test_packed_scales(functionalization: str) -> None:
    def fn(x, r, w):
        y, h = add_norm(x, r, w)
        return *vllm_ops.per_token_group_fp8_quant_packed(y), h, y * 2

    outcome = run_with_pass(fn, *ARGS)
    assert outcome.ops() == ["normquant.add_rms_norm_quant_with_norm.default"]
    assert QuantSpec.decode(outcome.site.spec).scale == "ue8m0_packed"
    assert_same(outcome.result, fn(*ARGS))


def test_epsilons_are_read_from_the_graph() -> None:
    def fn(x, r, w):
        return vllm_ops.per_token_group_fp8_quant(norm(x, w, 0.5), eps=1e-4)

    outcome = run_with_pass(fn, *ARGS)
    assert QuantSpec.decode(outcome.site.spec).floor == 1e-4
    assert_same(outcome.result, fn(*ARGS))


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (lambda x, w: torch.ops.vllm_ir.rms_norm(x, None, 1e-6), "no weight"),
        (lambda x, w: torch.ops.vllm_ir.rms_norm(x, w, 1e-6, 128), "part of the row"),
        (lambda x, w: torch.ops.vllm_ir.rms_norm(x, w.float(), 1e-6), "weight of torch.float32"),
    ],
    ids=["no weight", "variance size", "mixed dtypes"],
)
def test_norms_that_the_kernels_lack_stay(fn, words: str) -> None:
    def quantized(x, w):
        return vllm_ops.per_token_group_fp8_quant(fn(x, w).to(torch.bfloat16))

    outcome = run_with_pass(quantized, ARGS[0], ARGS[2])
    assert words in outcome.site.reason and outcome.ops() == []
    assert_same(outcome.result, quantized(ARGS[0], ARGS[2]))


def test_the_gate_that_fuses_only_opaque_norms() -> None:
    def fn(x, r, w):
        h = r.float()
        y = w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(r.dtype)
        return vllm_ops.per_token_group_fp8_quant(norm(x, w)), vllm_ops.per_token_group_fp8_quant(y)

    outcome = run_with_pass(fn, *ARGS, rules=Rules("opaque-norm"))
    assert sorted(site.fused for site in outcome.sites) == [False, True]
    assert_same(outcome.result, fn(*ARGS))


def test_native_turns_the_opaque_quantization_into_aten() -> None:
    def fn(x, r, w):
        y, h = add_norm(x, r, w)
        return *vllm_ops.per_token_group_fp8_quant(y, ue8m0=True, layout="col"), h

    with torch._inductor.config.patch(enable_auto_functionalized_v2=False):
        outcome = run_with_pass(fn, *ARGS, rules=Rules("native"))
    assert outcome.site.strategy == "native" and outcome.ops("auto_functionalized") == []
    assert_same(outcome.result, fn(*ARGS))
    assert outcome.result[1].stride() == (1, M)
