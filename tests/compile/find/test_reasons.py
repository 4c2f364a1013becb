"""Values are compared, not nodes; and where a site stays, the reason says what was found and what was expected."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from shared.pass_harness import assert_same, exact, run_with_pass

import normquant as nq
from normquant.compile import clear, explain, inductor_options
from normquant.compile.policy import Rules
from normquant.spec import QuantSpec

M, K, EPS = 6, 256, 1e-6
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
ARGS = (exact(M, K), exact(M, K, seed=1), exact(K, seed=2) + 0.5)

OPAQUE = torch.library.Library("normquant_reasons", "DEF")
OPAQUE.define("to_fp8(Tensor x) -> (Tensor, Tensor)")
OPAQUE.impl("to_fp8", lambda x: (x.to(FP8), torch.ones(x.shape[0], 1)), "CPU")
torch.library.register_fake(
    "normquant_reasons::to_fp8", lambda x: (x.new_empty(x.shape, dtype=FP8), x.new_empty(x.shape[0], 1)), lib=OPAQUE
)


def rstd(h):
    return torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)


def norm(x, w):
    return F.rms_norm(x, (K,), w, EPS)


def scale_of(y):
    return y.reshape(y.shape[0], -1, 128).float().abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0


def divided(y, s):
    return (y.reshape(y.shape[0], -1, 128).float() / s).clamp(-448, 448).to(FP8).view(y.shape)


def quant(y):
    s = scale_of(y)
    return divided(y, s), s.squeeze(-1)


def run(fn, *args):
    """The outcome of fn, which must return what eager returns."""
    given = args or ARGS
    outcome = run_with_pass(fn, *(t.clone() for t in given))
    assert_same(outcome.result, fn(*(t.clone() for t in given)))
    return outcome


@pytest.mark.parametrize("add", [lambda x, r: x + r, lambda x, r: x.float() + r.float()], ids=["rounded", "fp32"])
@pytest.mark.parametrize("kept", [False, True], ids=["unread", "kept"])
def test_a_sum_that_is_written_twice_is_one_value(kept: bool, add) -> None:
    def fn(x, r, w):
        y = (add(x, r).float() * rstd(add(x, r).float()) * w).to(BF16)
        return (*quant(y), add(x, r).to(BF16)) if kept else quant(y)

    outcome = run(fn)
    assert outcome.site.op == "add_rms_norm_quant", outcome.site
    assert outcome.ops("aten.rsqrt", "aten.pow") == []


def test_a_sum_that_is_written_twice_and_changed_in_between_is_two() -> None:
    def fn(x, r, w):
        first, second = x + r, x + r
        second.mul_(2)
        return quant((first.float() * rstd(second.float())).to(BF16) * w)

    def inputs_changed(x, r, w):
        first = x + r
        x.mul_(2)
        return quant((first.float() * rstd((x + r).float())).to(BF16) * w)

    for each in (fn, inputs_changed):
        site = run(each).site
        assert not site.fused and "the squares are of aten." in site.reason
        assert "another tensor than the normalized one, aten.add" in site.reason


def test_a_norm_that_is_written_twice_is_one_value() -> None:
    outcome = run(lambda x, r, w: (divided(norm(x, w), scale_of(norm(x, w))), scale_of(norm(x, w)).squeeze(-1)))
    assert all(site.fused for site in outcome.sites) and outcome.sites, outcome.reports
    assert outcome.ops("aten.rsqrt") == []


def test_the_amax_of_another_norm() -> None:
    site = run(lambda x, r, w: divided(norm(x, w), scale_of(norm(r, w)))).site
    assert not site.fused and "the amax is taken of" in site.reason and "another tensor than" in site.reason


@pytest.mark.parametrize("heads", [2, 4])
def test_a_norm_of_a_copy_that_is_contiguous(heads: int) -> None:
    """As BitNet norms the attention's output, whose heads were put behind one another."""

    def fn(x, w):
        return quant(norm(x.transpose(0, 1).reshape(M, K), w))

    x = exact(heads, M, K // heads)
    outcome = run(fn, x, ARGS[2])
    assert outcome.site.fused and outcome.ops("aten.rsqrt") == []
    assert run(lambda x, r, w: quant(norm(x.t().contiguous().view(M, K), w)), exact(K, M), *ARGS[1:]).site.fused


@pytest.mark.parametrize(
    "finite", [lambda s: s.abs() < float("inf"), torch.isfinite, None], ids=["lt", "isfinite", "no"]
)
def test_a_power_of_two_by_bits(finite) -> None:
    def powers_of_two(s):
        up = ((s.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
        return torch.where(finite(s), up, s) if finite else up

    def fn(x, r, w):
        y = norm(x, w)
        s = powers_of_two(scale_of(y))
        return divided(y, s), s.squeeze(-1)

    site = run(fn).site
    assert site.fused and QuantSpec.decode(site.spec).scale == "ue8m0", site


def test_other_bits_are_no_power_of_two_above() -> None:
    def fn(x, r, w):
        y = norm(x, w)
        s = (scale_of(y).view(torch.int32) & 0x7F800000).view(torch.float32)
        return divided(y, s), s.squeeze(-1)

    site = run(fn).site
    assert not site.fused and "the scale passes through aten.view" in site.reason


def test_what_the_native_form_writes_is_read_again() -> None:
    spec = QuantSpec(scale="ue8m0")

    def fn(x, r, w):
        q = nq.group_quant(norm(x, w), spec=spec)
        return q.data, q.scale

    from normquant.compile import driver

    outcome = run_with_pass(fn, *ARGS, rules=Rules("native"))
    (gm,) = outcome.graphs
    (site,) = driver.run(gm.graph, Rules("always"), strict=True).sites
    assert site.fused and QuantSpec.decode(site.spec) == spec.replace(rounding="once")


def test_scales_that_are_stored_as_exponents_are_no_second_quantization() -> None:
    def fn(x, r, w):
        y = norm(x, w)
        s = torch.exp2(torch.ceil(torch.log2(scale_of(y))))
        return divided(y, s), s.squeeze(-1).to(torch.float8_e8m0fnu).float()

    outcome = run(fn)
    assert outcome.site.fused and outcome.reports[0].others == ()


def test_an_outer_rstd_is_no_weight() -> None:
    def fn(x, r, w):
        h = x.view(2, 3, K).float()
        return quant((h * rstd(h) * rstd(r.view(2, 3, K).float())).to(BF16))

    site = run(fn).site
    assert "multiplied with another rstd, not with a weight" in site.reason

    def by_row(x, r, w):
        h = x.view(2, 3, K).float()
        return quant((h * rstd(h) * r.view(2, 3, K).float().sigmoid().sum(-1, keepdim=True)).to(BF16))

    words = "multiplied with one value per row, aten.sum of shape (2, 3, 1), not with a weight"
    assert words in run(by_row).site.reason


def test_arithmetic_that_is_not_read_is_not_taken_for_the_input() -> None:
    def no_division(x, r, w):
        return (norm(x, w).float() + 1).clamp(-448, 448).to(FP8)

    def static(x, r, w):
        return (norm(x, w).float() / r.float()[0, 0]).clamp(-448, 448).to(FP8)

    for fn, words in (
        (no_division, "its data comes from aten.add; expected a division by the scale of each group"),
        (static, "expected the amax of each group"),
    ):
        (other,) = run(fn).reports[0].others
        assert words in other.reason and "its input is" not in other.reason, other.reason


def test_an_operation_that_quantizes_inside_is_reported_as_what_it_is() -> None:
    def fn(x, r, w):
        return torch.ops.normquant_reasons.to_fp8(norm(x, w))

    (other,) = run(fn).reports[0].others
    assert "it is made inside of normquant_reasons.to_fp8; expected aten operations" in other.reason
    clear()
    torch._dynamo.reset()
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        torch.compile(fn, options=inductor_options("always"))(*ARGS)
    assert "normquant_reasons.to_fp8" in explain() and "no graph with a quantization" not in explain()
    clear()
