"""What belongs to a site and what stands in its way: shared norms, other readers, changes in place."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from shared.pass_harness import assert_same, exact, run_with_pass

import normquant as nq
from normquant.compile.find.sites import find
from normquant.compile.policy import Rules
from normquant.spec import QuantSpec

M, K = 6, 256
BF16 = torch.bfloat16
ARGS = (exact(M, K), exact(M, K, seed=1), exact(K, seed=2) + 0.5)


def norm(x, w):
    return F.rms_norm(x, (K,), w, 1e-6)


def quant(y, **fields):
    q = nq.group_quant(y, spec=QuantSpec(**fields))
    return q.data, q.scale


def run(fn, *args, **options):
    """The outcome, after checking that it is what eager gives."""
    given = args or ARGS
    expected = fn(*(t.clone() for t in given))
    outcome = run_with_pass(fn, *(t.clone() for t in given), **options)
    assert_same(outcome.result, expected)
    return outcome


def test_a_norm_that_several_quantizations_read_is_one_op() -> None:
    def fn(x, r, w):
        y = norm(x + r, w)
        return quant(y)[0].float() + 1, quant(y.clone())[1], quant(y.view(2, 3, K))

    outcome = run(fn)
    assert outcome.site.fused and outcome.ops() == ["normquant.add_rms_norm_quant.default"]


def test_quantizations_that_differ_are_ops_of_their_own() -> None:
    def fn(x, r, w):
        h = x + r
        y = norm(h, w)
        return quant(y), quant(y, group=64), h, y * 2

    outcome = run(fn)
    ops = ["normquant.add_rms_norm_quant_with_norm.default", "normquant.rms_norm_quant.default"]
    assert sorted(outcome.ops()) == ops, "the norm comes out of one of them"
    assert outcome.ops("aten.add") == [], "the second op reads the first one's sum"


@pytest.mark.parametrize("aligned", [False, True], ids=["col", "col_tma"])
def test_quantizations_whose_scales_lie_differently_are_one_op(aligned: bool) -> None:
    def fn(x, r, w):
        y = norm(x, w)
        return quant(y), quant(y, layout="col"), quant(y, layout="col_tma") if aligned else x

    outcome = run(fn)
    assert outcome.ops() == ["normquant.rms_norm_quant.default"]
    assert outcome.site.kernels_saved == 1, "the others are copies of scales"
    expected = fn(*ARGS)
    assert [t.stride() for pair in outcome.result[:2] for t in pair] == [t.stride() for p in expected[:2] for t in p]
    if aligned:
        assert outcome.result[2][1].stride() == expected[2][1].stride()


def rounded_twice(x, w):
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(BF16)


@pytest.mark.parametrize("norm", [norm, rounded_twice])
@pytest.mark.parametrize(
    "add", [lambda x, r: x, lambda x, r: x + r, lambda x, r: x.float() + r.float()], ids=("none", "rounded", "fp32")
)
def test_a_norm_that_is_written_down_again_is_computed_once(norm, add) -> None:
    def again(x, r, w):
        return norm(add(x, r).to(BF16), w)

    def fn(x, r, w):
        return quant(again(x, r, w))[0].float(), quant(again(x, r, w)), again(x, r, w) * 2, again(x, r, w).view(-1) + 1

    outcome = run(fn)
    residual = "add_" if add(*ARGS[:2]) is not ARGS[0] else ""
    assert outcome.ops() == [f"normquant.{residual}rms_norm_quant_with_norm.default"] and len(outcome.sites) == 1
    assert outcome.ops("aten.rsqrt", "aten.add.Tensor") == ["aten.add.Tensor"], "only the one behind the view"


def test_unrounded_sums_that_are_written_down_again() -> None:
    def fn(x, r, w):
        first, second = (x.float() + r.float() for _ in range(2))
        return quant(rounded_twice(first, w).to(BF16)), rounded_twice(second, w).to(BF16) * 2, second.to(BF16) * 3

    assert run(fn).ops() == ["normquant.add_rms_norm_quant_with_norm.default"]


def test_norms_of_different_weights_or_epsilons_stay_apart() -> None:
    def fn(x, r, w):
        return quant(norm(x, w)), quant(norm(x, w + 1)), quant(F.rms_norm(x, (K,), w, 1e-5)), norm(x, r[0]) * 2

    outcome = run(fn)
    assert outcome.ops() == ["normquant.rms_norm_quant.default"] * 3


def test_a_copy_of_a_norm_whose_inside_is_read_stays_alone() -> None:
    def fn(x, r, w):
        rstd, _, y = inside(x, w)
        return quant(y), rstd * 2, quant(inside(x, w)[2])

    outcome = run(fn)
    assert sorted(site.fused for site in outcome.sites) == [False, True]


def test_what_was_two_tensors_does_not_become_one() -> None:
    """A caller may change one of them in place."""

    def fn(x, r, w):
        return quant(norm(x, w)), quant(norm(x, w)), norm(x, w), norm(x, w)

    outcome = run(fn)
    tensors = torch.utils._pytree.tree_leaves(outcome.result)
    assert outcome.ops() == ["normquant.rms_norm_quant_with_norm.default"]
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors) == 6


@pytest.mark.parametrize(
    "router", [lambda y: y * 2, lambda y: y.float() * 2, lambda y: y.view(-1)], ids=("product", "fp32", "view")
)
def test_a_norm_with_other_readers_comes_out_of_the_op(router) -> None:
    def fn(x, r, w):
        y = norm(x, w)
        return quant(y), router(y)

    outcome = run(fn)
    assert outcome.ops() == ["normquant.rms_norm_quant_with_norm.default"]
    assert outcome.ops("aten.rsqrt") == []


def test_an_unrounded_norm_gives_its_rounding_to_other_readers() -> None:
    def fn(x, r, w):
        h = x.float()
        y = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * w
        g = y.view(M, -1, 128)
        s = g.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0
        return (g / s).to(torch.float8_e4m3fn), y.to(BF16) * 2

    assert run(fn).ops() == ["normquant.rms_norm_quant_with_norm.default"]


def inside(x, w):
    h = x.float()
    rstd = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    n = h * rstd
    return rstd, n, (n * w).to(BF16)


@pytest.mark.parametrize("which", [0, 1], ids=["rstd", "n"])
def test_a_norm_whose_inside_is_read_stays(which: int) -> None:
    def fn(x, r, w):
        parts = inside(x, w)
        return quant(parts[2]), parts[which] * 2

    outcome = run(fn)
    assert not outcome.fused and "is also read by" in outcome.site.reason


def test_norms_that_share_their_rstd_are_fused_together_or_not_at_all() -> None:
    def fn(x, r, w):
        _, n, y = inside(x, w)
        return quant(y), quant((n * (w + 1)).to(BF16))

    assert len(run(fn).fused) == 2

    def with_reader(x, r, w):
        rstd, n, y = inside(x, w)
        return quant(y), quant((n * (w + 1)).to(BF16)), rstd

    assert run(with_reader).fused == []


def test_the_amax_read_outside_keeps_the_site() -> None:
    def fn(x, r, w):
        g = norm(x, w).view(M, -1, 128).float()
        amax = g.abs().amax(-1, keepdim=True).clamp(min=1e-10)
        s = amax / 448.0
        return (g / s).to(torch.float8_e4m3fn), s, amax * 2

    assert "inside of the quantization" in run(fn).site.reason


def test_data_and_scales_with_readers_of_their_own() -> None:
    def fn(x, r, w):
        data, scale = quant(norm(x, w), layout="col")
        back = data.float().view(M, -1, 128) * scale.unsqueeze(-1)
        return data.view(2, -1), scale.t(), back, scale * 2, scale

    assert run(fn).site.fused


def test_unread_results() -> None:
    assert run(lambda x, r, w: quant(norm(x, w))[0]).site.fused
    assert run(lambda x, r, w: quant(norm(x, w))[1]).site.fused


def test_changes_in_place_keep_their_order() -> None:
    def before(x, r, w):
        x.mul_(2)
        return quant(norm(x, w)), x

    def between(x, r, w):
        y = norm(x, w)
        x.mul_(2)
        return quant(y), x

    def of_the_norm(x, r, w):
        y = norm(x, w)
        data = quant(y)
        y.add_(1)
        return data, y

    def of_a_copy(x, r, w):
        h = x + r
        y = h.clone()
        h.mul_(0.5)
        return quant(norm(y, w)), h

    for fn in (before, between, of_the_norm, of_a_copy):
        assert run(fn).site.fused, fn.__name__


def test_nothing_moves_across_an_operation_that_changes_a_tensor() -> None:
    graph = run_with_pass(lambda x, r, w: quant(norm(x, w)), *ARGS, rules=Rules("never")).graphs[0].graph
    anchor = next(node for node in graph.nodes if "group_quant" in str(node.target))
    x, *_ = graph.find_nodes(op="placeholder")
    with graph.inserting_before(anchor):
        copy = graph.call_function(torch.ops.aten.copy_.default, (x, x))
        copy.meta["val"] = x.meta["val"]
    reasons = [rejected.reason for rejected in find(graph).rejected]
    assert reasons == ["a tensor is changed in place between the norm and the quantization"]


def test_a_weight_that_depends_on_the_sum() -> None:
    """The op cannot make the sum and take a weight computed from it: the add stays outside."""

    def fn(x, r, w):
        h = x + r
        weight = w * h.mean()
        return quant(norm(h, weight)), h

    outcome = run(fn)
    assert outcome.ops() == ["normquant.rms_norm_quant.default"] and outcome.ops("aten.add") != []


def test_an_addend_that_the_compiler_generates_keeps_the_add() -> None:
    def fn(x, r, w):
        h = x + (r.float() * 3.0).to(BF16)
        return quant(norm(h, w)), h

    assert run(fn).ops() == ["normquant.rms_norm_quant.default"]


def test_chained_residuals_and_two_norms_of_one_sum() -> None:
    def fn(x, r, w):
        h = x + r
        q1 = quant(norm(h, w))
        h2 = h + x
        return q1, quant(norm(h2, w)), quant(norm(h2, w + 1)), h2, h

    outcome = run(fn)
    assert len(outcome.fused) == 3 and outcome.ops("aten.add.Tensor") == ["aten.add.Tensor"], "only w + 1 is left"


def test_rows_that_are_far_apart_are_read_where_they_are() -> None:
    def fn(x, r, w):
        q, kv = torch.cat([x, r, x], -1).split([K, 2 * K], -1)
        return quant(norm(q, w)), quant(norm(kv[:, :K], w))

    outcome = run(fn)
    assert len(outcome.fused) == 2 and outcome.ops("aten.clone") == []


def test_a_quantization_without_a_norm_is_reported_apart() -> None:
    outcome = run(lambda x, r, w: quant(x * r))
    (report,) = outcome.reports
    assert report.sites == () and "aten.mul, not an RMSNorm" in report.others[0].reason


def test_a_graph_without_quantizations_is_left_alone() -> None:
    (report,) = run(lambda x, r, w: norm(x, w)).reports
    assert report.sites == () and report.others == () and report.cleaned == 0


def test_shapes_are_asked_of_the_input() -> None:
    """With several symbolic dimensions the quantization asks the norm for its rows; that must not keep the norm."""

    def fn(x, r, w):
        y = norm(x, w).view(-1, K)
        g = y.view(y.shape[0], -1, 128).float()
        s = g.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0
        return (g / s).to(torch.float8_e4m3fn).view(y.shape), s

    x = exact(2, 3, K)
    for dim in (0, 1):
        torch._dynamo.mark_dynamic(x, dim)
    outcome = run_with_pass(fn, x, *ARGS[1:])
    assert outcome.ops() == ["normquant.rms_norm_quant.default"] and outcome.ops("aten.rsqrt") == []
    assert_same(outcome.result, fn(x, *ARGS[1:]))
