"""vLLM's fusion cases: its IR norms, its quantization ops as auto_functionalized leaves them, ue8m0 included."""

from __future__ import annotations

import pytest
import torch
from shared import vllm_ops
from shared.pass_harness import assert_same, exact, keeps_roundings, run_with_pass

from normquant.compile.policy import Rules
from normquant.spec import QuantSpec

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
        (lambda x, w: torch.ops.vllm_ir.rms_norm(x, w.half(), 1e-6), "weight of torch.float16"),
    ],
    ids=["no weight", "variance size", "mixed dtypes"],
)
def test_norms_that_the_kernels_lack_stay(fn, words: str) -> None:
    def quantized(x, w):
        return vllm_ops.per_token_group_fp8_quant(fn(x, w).to(torch.bfloat16))

    outcome = run_with_pass(quantized, ARGS[0], ARGS[2])
    assert words in outcome.site.reason and outcome.ops() == []
    assert_same(outcome.result, quantized(ARGS[0], ARGS[2]))


GEMMAS = {
    "w.float() + 1": (lambda w: w.float() + 1.0, 1.0),
    "w.float()": (lambda w: w.float(), 0.0),
    "an fp32 weight": (lambda w: w, 0.0),
    "an fp32 weight + 1": (lambda w: w + 1.0, 1.0),
}


@pytest.mark.parametrize("residual", [False, True], ids=["norm", "add norm"])
@pytest.mark.parametrize("name", GEMMAS)
def test_norms_with_an_fp32_weight_round_once(name: str, residual: bool) -> None:
    """As `GemmaRMSNorm` writes them, in Gemma, Qwen3-Next and Qwen3.5."""
    factor, offset = GEMMAS[name]
    x, r, w = exact(M, K), exact(M, K, seed=1), exact(K, seed=2) / 8
    w = w.float() * 1.001 if "fp32" in name else w

    def fn(x, r, w):
        y, h = add_norm(x, r, factor(w)) if residual else (norm(x, factor(w)), x)
        return *vllm_ops.per_token_group_fp8_quant(y), y, h * 1.0

    outcome = run_with_pass(fn, x, r, w)
    assert outcome.site.fused, outcome.site.reason
    assert QuantSpec.decode(outcome.site.spec).rounding == "once"
    (node,) = [n for n in outcome.graphs[0].graph.nodes if "rms_norm_quant" in str(n.target)]
    assert node.args[-2] == offset
    assert outcome.ops() == [f"normquant.{'add_' * residual}rms_norm_quant_with_norm.default"]
    assert_same(outcome.result, fn(x, r, w))


@pytest.mark.parametrize("gemma", [False, True], ids=["w", "w + 1"])
def test_norms_of_heads_stay_in_front_of_rows_of_all_heads(gemma: bool) -> None:
    """A norm of each head has rows of a head, and a quantization of what follows has rows of all heads."""
    w = exact(128, seed=2) / 8

    def fn(x, w):
        heads = torch.ops.vllm_ir.rms_norm(x.view(-1, K // 128, 128), w.float() + 1.0 if gemma else w, 1e-6)
        return vllm_ops.per_token_group_fp8_quant(heads.view(-1, K))

    outcome = run_with_pass(fn, exact(M, K), w)
    assert outcome.site.reason == "the quantization reads rows of 512 values, the norm makes rows of 128"
    assert_same(outcome.result, fn(exact(M, K), w))


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


QUANTS = {
    "128 by row": (lambda y: vllm_ops.per_token_group_fp8_quant(y), "row"),
    "64 by row": (lambda y: vllm_ops.per_token_group_fp8_quant(y, 64), "row"),
    "128 by column": (lambda y: vllm_ops.per_token_group_fp8_quant(y, layout="col"), "col"),
    "128 aligned": (lambda y: vllm_ops.per_token_group_fp8_quant(y, layout="col_tma"), "col_tma"),
    "ue8m0 aligned": (lambda y: vllm_ops.per_token_group_fp8_quant(y, ue8m0=True, layout="col_tma"), "col_tma"),
    "ue8m0 packed": (vllm_ops.per_token_group_fp8_quant_packed, "col_tma"),
}


def native_norm(x, w, eps):
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * w


def native_add_norm(x, r, w, eps):
    h = x.float() + r.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * w, h.to(x.dtype)


def chain(quantize, norm, add_norm, eps):
    """Four norms with three linears between them. A linear here makes values whose sums of squares are exact."""

    def linear(quantized, dtype):
        data, scale = quantized
        return (torch.round(data.float()).clamp(-8, 8) / 4 + scale.sum() * 0).to(dtype)

    def fn(x, *ws):
        x = residual = torch.relu(x)
        y = norm(x, ws[0], eps)
        for w in ws[1:]:
            y, residual = add_norm(linear(quantize(y), x.dtype), residual, w, eps)
        return y

    return fn


@pytest.mark.parametrize("eps", [1e-5, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "norms",
    [
        pytest.param((norm, add_norm), id="IR"),
        pytest.param((native_norm, native_add_norm), id="native", marks=keeps_roundings),
    ],
)
@pytest.mark.parametrize("name", QUANTS)
def test_a_chain_of_norms_and_linears(name: str, norms, dtype: torch.dtype, eps: float) -> None:
    quantize, layout = QUANTS[name]
    fn = chain(quantize, *norms, eps)
    x, *ws = (exact(257, 256, dtype=dtype), *(exact(256, dtype=dtype, seed=i) + 0.5 for i in range(1, 5)))
    torch._dynamo.mark_dynamic(x, 0)
    with torch._inductor.config.patch(enable_auto_functionalized_v2=False):
        outcome = run_with_pass(fn, x, *ws)
    ops = ["normquant.add_rms_norm_quant.default"] * 2 + ["normquant.rms_norm_quant.default"]
    assert sorted(outcome.ops()) == ops and outcome.ops("auto_functionalized") == []
    specs = [QuantSpec.decode(site.spec) for site in outcome.sites]
    assert all((spec.layout, spec.rounding) == (layout, "twice") for spec in specs)
    assert [n.args[-3] for n in outcome.graphs[0].graph.nodes if "rms_norm_quant" in str(n.target)] == [eps] * 3
    assert_same(outcome.result, fn(x, *ws))


def per_token(y):
    s = (y.abs().amax(-1, keepdim=True).float() / 448.0).clamp(min=1 / (448.0 * 512))
    return (y.float() * s.reciprocal()).clamp(-448, 448).to(torch.float8_e4m3fn), s


def per_tensor(y):
    return (y.float() * torch.full((1,), 0.5).reciprocal()).clamp(-448, 448).to(torch.float8_e4m3fn), torch.ones(1)


@pytest.mark.parametrize(("quantize", "words"), [(per_token, "the group is 256"), (per_tensor, "")])
def test_scales_of_rows_and_tensors_stay(quantize, words: str) -> None:
    fn = chain(quantize, norm, add_norm, 1e-6)
    args = (exact(257, 256), *(exact(256, seed=i) + 0.5 for i in range(1, 5)))
    outcome = run_with_pass(fn, *args)
    (report,) = outcome.reports
    found = (*report.sites, *report.others)
    assert len(found) == 3 and outcome.ops() == [] and all(words in site.reason for site in found)
    assert_same(outcome.result, fn(*args))


@pytest.mark.parametrize("residual", [False, True], ids=["norm", "add norm"])
def test_the_same_norm_for_a_router_and_for_experts_is_one_op(residual: bool) -> None:
    def fn(x, r, w):
        (y, h), (again, _) = ((add_norm(x, r, w) if residual else (norm(x, w), x)) for _ in range(2))
        return *vllm_ops.per_token_group_fp8_quant(y, layout="col_tma"), again.float() * 2, h * 1.0

    with torch._inductor.config.patch(enable_auto_functionalized_v2=False):
        outcome = run_with_pass(fn, *ARGS)
    assert outcome.ops() == [f"normquant.{'add_' * residual}rms_norm_quant_with_norm.default"]
    assert outcome.ops("vllm_ir") == []
    assert_same(outcome.result, fn(*ARGS))
