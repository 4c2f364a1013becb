"""What belongs to a site and what stands in its way: shared norms, other readers, changes in place."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from shared.pass_harness import assert_same, exact, run_with_pass
from shared.quick_graphs import graph_of
from torch.fx import Graph, Node

import normquant as nq
from normquant.compile.find.graph import aten, prims
from normquant.compile.find.sites import NEAR, Found, _follows_norm, find, is_anchor, is_opaque_quant
from normquant.spec import QuantSpec

M, K = 6, 256
BF16 = torch.bfloat16
ARGS = (exact(M, K), exact(M, K, seed=1), exact(K, seed=2) + 0.5)


def norm(x, w):
    """`F.rms_norm` as Inductor decomposes it."""
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * w).to(BF16)


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


def unchanged(fn) -> Graph:
    """The graph of fn before the pass."""
    return graph_of(fn, *ARGS).graph


def found_in(fn) -> Found:
    return find(unchanged(fn))


def change_before(node: Node) -> Node:
    """Change the first input in place."""
    x, *_ = node.graph.find_nodes(op="placeholder")
    with node.graph.inserting_before(node):
        change = node.graph.call_function(aten.copy_.default, (x, x))
    change.meta["val"] = x.meta["val"]
    return change


def written_out(y, least=-448.0):
    """A quantization in aten operations."""
    g = y.reshape(y.shape[0], -1, 128).float()
    s = g.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0
    return (g / s).clamp(least, 448).to(torch.float8_e4m3fn)


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
    graph = unchanged(lambda x, r, w: quant(norm(x, w)))
    (anchor,) = filter(is_anchor, graph.nodes)
    change_before(anchor)
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


OPERATIONS = [torch.library.Library(name, "FRAGMENT") for name in ("normquant_sites", "normquant_vllm")]
for library in OPERATIONS:
    library.define("to_fp8(Tensor x) -> Tensor")
    library.define("to_fp8_and_scales(Tensor x) -> (Tensor, Tensor?)")
    library.define("to_half(Tensor x) -> Tensor")


def calls(*targets, dtype=BF16):
    """A call of each operation on one tensor of a dtype; what they make is fp8, but for `to_half`."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(M, K, dtype=dtype)
    for target in targets:
        node = graph.call_function(target, (x,))
        made = torch.empty(M, K, dtype=BF16 if "half" in str(target) else torch.float8_e4m3fn)
        node.meta["val"] = (made, None) if "scales" in str(target) else made
        yield node


def test_operations_that_quantize_inside_are_of_somebody_else_and_make_fp8_of_other_values() -> None:
    foreign, vllm = torch.ops.normquant_sites, torch.ops.normquant_vllm
    ours, aten, prims = torch.ops.normquant.group_quant, torch.ops.aten, torch.ops.prims
    makes = [foreign.to_fp8.default, foreign.to_fp8_and_scales.default]
    known = [vllm.to_fp8.default, ours.default, aten.neg.default, prims.neg.default, torch.neg]
    assert [is_opaque_quant(node) for node in calls(*makes, foreign.to_half.default)] == [True, True, False]
    assert [is_opaque_quant(node) for node in calls(*known)] == [False] * len(known)
    assert [is_opaque_quant(node) for node in calls(*makes, dtype=torch.float8_e4m3fn)] == [False, False]
    (node,) = calls(makes[0])
    assert not is_opaque_quant(node.args[0])
    node.meta = {}
    assert not is_opaque_quant(node), "nothing is known of what it makes"
    (node,) = calls(makes[0])
    found = find(node.graph)
    ((anchor, reason),) = [(other.anchor, other.reason) for other in found.others]
    assert anchor is node and reason.startswith("it is made inside of normquant_sites.to_fp8; expected aten")


def test_anchors_are_quantizations_and_casts_to_fp8() -> None:
    def fn(x, r, w):
        data = written_out(x)
        return data, data.to(torch.float8_e5m2), x.float(), quant(x)

    anchors = [node for node in unchanged(fn).nodes if is_anchor(node)]
    assert [str(node.target).split(".")[0] for node in anchors] == ["prims", "normquant"]
    assert anchors[0].meta["val"].dtype == torch.float8_e4m3fn


def test_a_quantization_that_is_not_read_is_a_site_where_a_norm_is_near() -> None:
    reason = "the data is clamped to (-240.0, None); the kernels clamp to +-448"

    def behind(x, r, w):
        return written_out(norm(x, w), least=-240.0)

    def alone(x, r, w):
        return written_out(x * r, least=-240.0)

    def far_behind(x, r, w):
        y = norm(x, w)
        for i in range(70):
            y = (y + i).sin()
        return written_out(y, least=-240.0)

    for fn in (behind, alone, far_behind):
        graph = unchanged(fn)
        found = find(graph)
        (anchor,) = filter(is_anchor, graph.nodes)
        (near, far) = (found.rejected, found.others) if fn is behind else (found.others, found.rejected)
        ((site,), nothing) = near, far
        assert nothing == [] and found.matches == []
        assert site.anchor is anchor and site.norm is None and site.reason == reason, fn


@pytest.mark.parametrize("root", [torch.rsqrt, torch.sqrt])
def test_a_norm_is_near_where_a_root_is(root) -> None:
    def fn(x, r, w):
        return written_out((x.float() * root(r.float())).to(BF16), least=-240.0)

    assert len(found_in(fn).rejected) == 1


def test_a_norm_whose_quantization_cannot_be_is_named() -> None:
    """What was read of the norm comes along: a fusion of its own may still take it."""

    def narrow(x, r, w):
        return quant(norm(x.view(-1, 128), w[:128]).view(M, K))

    (site,) = found_in(narrow).rejected
    assert site.norm is not None and site.norm.k == 128
    assert site.reason == "the quantization reads rows of 256 values, the norm makes rows of 128"


def test_of_what_changes_in_place_anchor_and_norm_are_named() -> None:
    graph = unchanged(lambda x, r, w: (quant(norm(x, w)), quant(norm(r, w))))
    first, second = filter(is_anchor, graph.nodes)
    change_before(first)
    found = find(graph)
    assert [node for match in found.matches for node in match.ys] == [second.args[0]]
    (site,) = found.rejected
    assert site.norm is not None and site.norm.y is first.args[0]
    assert site.anchor in (first, *first.users)


def unrounded_weight(x, r, w):
    h = x.neg().float() + r.float()
    rstd = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return quant((h * rstd * (w.float() + 1).view(1, K)).to(BF16)), h.to(BF16)


def test_a_change_anywhere_between_what_the_op_reads_and_the_quantization_keeps_the_site() -> None:
    """Also between the casts and views of its inputs: the op would read the inputs after the change."""
    graph = unchanged(unrounded_weight)
    calls = [node for node in graph.nodes if node.op == "call_function"]
    (anchor,) = filter(is_anchor, calls)
    for i, node in enumerate(calls[: calls.index(anchor) + 1]):
        change = change_before(node)
        found = find(graph)
        assert (len(found.matches), len(found.rejected)) == ((1, 0) if i <= 1 else (0, 1)), node
        graph.erase_node(change)


def test_the_arithmetic_of_a_site_has_the_norms_rounding_and_sum() -> None:
    def fn(x, r, w):
        h = x.float() + r.float()
        return quant(rounded_twice(h, w).to(BF16)), quant(norm(x, w)), quant(norm(x + r, w)), h.to(BF16)

    specs = [(match.spec.rounding, match.spec.sum) for match in found_in(fn).matches]
    assert specs == [("twice", "fp32"), ("once", "fp32"), ("once", "rounded")]


def test_packed_scales_keep_a_site_of_their_own() -> None:
    def fn(x, r, w):
        y = norm(x, w)
        return quant(y), quant(y, scale="ue8m0"), quant(y, scale="ue8m0_packed", layout="col_tma")

    sites = [(match.spec.scale, match.spec.layout) for match in found_in(fn).matches]
    assert sites == [("fp32", "row"), ("ue8m0", "row"), ("ue8m0_packed", "col_tma")]


def test_quantizations_of_one_arithmetic_are_one_match_in_the_layout_that_demands_most() -> None:
    def fn(x, r, w):
        y = norm(x, w)
        columns = quant(y, layout="col"), quant(y.view(2, 3, K))
        return columns, quant(y, floor=1e-4), quant(y, floor=1e-4, layout="col_tma"), y.view(-1) * 2

    found = found_in(fn)
    assert [(match.spec.layout, len(match.quants)) for match in found.matches] == [("col", 2), ("col_tma", 2)]
    first, second = found.matches
    assert first.spec == QuantSpec(layout="col") and second.spec == QuantSpec(layout="col_tma", floor=1e-4)
    assert (first.norms, second.norms) == (first.ys, ()), "the norm comes out of the first op alone"
    assert first.ys == second.ys == (first.quants[0].y,) and (found.rejected, found.others) == ([], [])


def in_columns(y):
    """A quantization in aten operations whose scales are column-major."""
    g = y.reshape(y.shape[0], -1, 128).float()
    s = g.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0
    return (g / s).to(torch.float8_e4m3fn), s.squeeze(-1).t().contiguous().t()


def test_scales_in_aten_operations_have_the_layout_of_their_readers() -> None:
    (match,) = found_in(lambda x, r, w: in_columns(norm(x, w))).matches
    assert match.spec == QuantSpec(layout="col")
    (match,) = found_in(lambda x, r, w: (written_out(norm(x, w)), quant(norm(x, w), layout="col")[0])).matches
    assert match.spec == QuantSpec(layout="col") and len(match.quants) == 2


def test_a_norm_that_is_written_down_again_is_one_match() -> None:
    graph = unchanged(lambda x, r, w: (quant(norm(x, w)), norm(x, w) * 2, quant(norm(x, w), layout="col")))
    (match,) = find(graph).matches
    rounded = [node for node in graph.find_nodes(op="call_function", target=prims.convert_element_type.default)][1::2]
    assert match.ys == tuple(rounded) and len(match.quants) == 2 and match.norms == match.ys


def test_a_norm_that_is_changed_after_its_quantization_is_a_match() -> None:
    graph = unchanged(lambda x, r, w: quant(norm(x, w)))
    (anchor,) = filter(is_anchor, graph.nodes)
    with graph.inserting_before(graph.output_node()):
        graph.call_function(aten.copy_.default, (anchor.args[0], anchor.args[0]))
    (match,) = find(graph).matches
    assert match.ys == anchor.args[:1]


def test_quantizations_before_and_after_a_change_are_matches_of_their_own() -> None:
    def fn(x, r, w):
        y = norm(x, w)
        return quant(y), quant(y)

    graph = unchanged(fn)
    first, second = filter(is_anchor, graph.nodes)
    change_before(second)
    found = find(graph)
    assert [quant.inner for match in found.matches for quant in match.quants] == [{first}]
    assert [site.anchor in second.users for site in found.rejected] == [True]


@pytest.mark.parametrize("quantized", [0, 1])
def test_of_a_norm_and_its_copy_the_one_whose_inside_nobody_reads_is_a_match(quantized: int) -> None:
    def fn(x, r, w):
        (rstd, _, first), (_, _, second) = inside(x, w), inside(x, w)
        ys = first, second
        return rstd * 2, quant(ys[quantized])

    found = found_in(fn)
    assert (len(found.matches), len(found.rejected)) == (quantized, 1 - quantized)
    assert all(len(match.same) == 1 for match in found.matches)

    def both(x, r, w):
        (rstd, _, first), (_, _, second) = inside(x, w), inside(x, w)
        of_one_value = quant(first), quant(second), quant(first, layout="col")
        return rstd * 2, of_one_value, quant(norm(r, w)), quant(norm(r + x, w))

    found = found_in(both)
    (match, *others), (site,) = found.matches, found.rejected
    assert site.norm is not None and len(match.quants) == 1 and match.norm.y is not site.norm.y
    assert match.norm.x is site.norm.x and len({other.norm.x for other in others} - {match.norm.x}) == 2


@pytest.mark.parametrize("shared", [0, 1], ids=["rstd", "n"])
def test_norms_whose_inside_is_one_are_matches_together_or_not_at_all(shared: int) -> None:
    def quantized(parts, r, w):
        _, n, y = parts
        return quant(y), quant((n * (w + 1)).to(BF16)), quant(norm(r, w))

    def with_reader(x, r, w):
        parts = inside(x, w)
        return quantized(parts, r, w), parts[shared] * 2

    assert len(found_in(lambda x, r, w: quantized(inside(x, w), r, w)).matches) == 3
    graph = unchanged(with_reader)
    first, second, _ = filter(is_anchor, graph.nodes)
    found = find(graph)
    assert len(found.matches) == 1
    assert [site.anchor.args[0] for site in found.rejected] == [first, second]
    assert [site.norm.y for site in found.rejected if site.norm] == [first.args[0], second.args[0]]
    (reader,) = [node for node in graph.find_nodes(op="call_function", target=aten.mul.Tensor) if node.args[1] == 2]
    what = "aten.rsqrt" if shared == 0 else "aten.mul"
    assert found.rejected[0].reason == f"{what} inside of the norm is also read by aten.mul ({reader.name})"


def test_the_reason_why_there_is_no_norm_in_front_is_that_of_each_quantization() -> None:
    def fn(x, r, w):
        y = x * r
        return quant(y), quant(y, group=64), written_out(x), quant(norm(x / w.sqrt(), w) / w.sqrt())

    graph = unchanged(fn)
    anchors = [*filter(is_anchor, graph.nodes)]
    found = find(graph)
    words = ["its input is aten.mul, not an RMSNorm"] * 2 + ["its input is placeholder, not an RMSNorm"]
    assert [(site.anchor, site.reason, site.norm) for site in found.others] == [
        (anchor, reason, None) for anchor, reason in zip(anchors, words, strict=False)
    ]
    (site,) = found.rejected
    assert site.anchor is anchors[-1] and site.norm is None and "divides by a square root" in site.reason


def behind(*targets) -> Node:
    """The last of some calls of one argument, each of what the one before it makes."""
    graph = Graph()
    node = graph.placeholder("x")
    for target in targets:
        node = graph.call_function(target, (node,))
    return node


def test_a_norm_is_near_among_the_last_operations() -> None:
    root, step, cast = aten.rsqrt.default, aten.neg.default, prims.convert_element_type.default
    assert _follows_norm(behind(root, cast)) and _follows_norm(behind(aten.sqrt.default, step, cast))
    assert _follows_norm(behind(aten._fused_rms_norm.default, step, cast))
    assert not _follows_norm(behind(aten.exp.default, step, cast)) and not _follows_norm(behind(root))
    assert _follows_norm(behind(root, *[step] * (NEAR - 2), cast))
    assert not _follows_norm(behind(root, *[step] * (NEAR - 1), cast))
    unknown = torch.ops.normquant_sites.to_half.default
    assert not _follows_norm(behind(root, unknown, cast)), "what an unknown operation makes is no norm's value"


@pytest.mark.parametrize("at", [0, 1])
def test_a_norm_is_near_however_far_the_other_operands_come(at: int) -> None:
    far = behind(*[aten.neg.default] * NEAR)
    near = far.graph.call_function(aten.rsqrt.default, (next(iter(far.graph.nodes)),))
    for _ in range(3):
        near = far.graph.call_function(aten.neg.default, (near,))
    operands = (near, far) if at == 0 else (far, near)
    assert _follows_norm(far.graph.call_function(aten.mul.Tensor, operands))
