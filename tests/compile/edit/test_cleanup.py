"""Identities, cast round trips and copies that a graph does not need."""

from __future__ import annotations

import pytest
import torch
from torch._inductor.custom_graph_pass import get_hash_for_files
from torch.fx.experimental.proxy_tensor import make_fx

from normquant.compile.edit import cleanup
from normquant.compile.edit.cleanup import CleanupPass, _needless_layout, clean, keep_outputs_apart, output_owners

BF16 = torch.bfloat16
aten = torch.ops.aten

LIBRARY = torch.library.Library("normquant_cleanup", "DEF")
LIBRARY.define("norm(Tensor x) -> Tensor")
LIBRARY.define("any_layout(Tensor x) -> Tensor", tags=(torch.Tag.flexible_layout,))
LIBRARY.define("fixed_layout(Tensor x) -> Tensor", tags=(torch.Tag.needs_fixed_stride_order,))
for _name in ("norm", "any_layout", "fixed_layout"):
    LIBRARY.impl(_name, lambda x: x * 2, "CPU")
    torch.library.register_fake(f"normquant_cleanup::{_name}", lambda x: torch.empty_like(x), lib=LIBRARY)
ops = torch.ops.normquant_cleanup


def cleaned(fn, *args):
    """The graph of fn after the clean-up, which must compute the same."""
    gm = make_fx(fn, tracing_mode="fake")(*args)
    expected = gm(*args)
    clean(gm.graph)
    gm.graph.lint()
    gm.recompile()
    for a, b in zip(gm(*args), expected, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()
    return [n.target for n in gm.graph.nodes if n.op == "call_function"]


def casts(fn):
    return lambda x: (ops.norm(fn(x)),)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x.float().to(BF16),
        lambda x: x.float().view(2, 2, 8).to(BF16).view(4, 8),
        lambda x: x.float().to(BF16).float().to(BF16),
        lambda x: x.clone(),
        lambda x: x.view(2, 16).view(4, 8),
    ],
    ids=["round trip", "through a view", "twice", "clone", "view and back"],
)
def test_what_moves_bytes_only_is_gone(fn) -> None:
    left = cleaned(casts(fn), torch.randn(4, 8, dtype=BF16))
    assert [t for t in left if "cast" in str(t) or "_to_copy" in str(t) or "clone" in str(t)] == []


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x.to(torch.float16).to(BF16),
        lambda x: (x.float() + 1e-3).to(BF16),
        lambda x: x.float().to(torch.float16),
    ],
    ids=["through fp16", "with work", "to another dtype"],
)
def test_casts_that_change_values_stay(fn) -> None:
    assert [t for t in cleaned(casts(fn), torch.randn(4, 8, dtype=BF16)) if t is aten._to_copy.default]


def test_a_layout_copy_goes_where_its_readers_take_any_layout() -> None:
    x = torch.arange(32.0).view(4, 8)  # sums are exact in any order
    assert aten.clone.default not in cleaned(lambda x: (ops.any_layout(x.t().contiguous()).sum(),), x)
    assert aten.clone.default in cleaned(lambda x: (ops.fixed_layout(x.t().contiguous()),), x)
    both = cleaned(lambda x: (ops.any_layout(x.t().contiguous()).sum(), ops.fixed_layout(x.t().contiguous())), x)
    assert both.count(aten.clone.default) == 1


@pytest.mark.parametrize(
    ("reader", "any_layout"),
    [
        (lambda y: y.amax(0), True),
        (lambda y: y.sum(0), True),
        (lambda y: y.mean(0), True),
        (lambda y: y * 2, True),
        (lambda y: ops.any_layout(y), True),
        (lambda y: ops.any_layout(y.view(2, 4, 4)), True),
        (lambda y: (y.view(32) + 1, y.view(2, 16) + 1), True),
        (lambda y: ops.fixed_layout(y), False),
        (lambda y: ops.fixed_layout(y.view(2, 4, 4)), False),
        (lambda y: (y.view(32) + 1, ops.fixed_layout(y.view(2, 16))), False),
        (lambda y: (ops.fixed_layout(y.view(2, 16)), y.view(32) + 1), False),
        (lambda y: y.cumsum(0), False),
    ],
)
def test_who_reads_any_layout(reader, any_layout) -> None:
    def fn(x):
        found = reader(x.t().contiguous())
        return found if isinstance(found, tuple) else (found,)

    gm = make_fx(fn, tracing_mode="fake")(torch.arange(32.0).view(4, 8))
    (copy,) = gm.graph.find_nodes(op="call_function", target=aten.clone.default)
    clean(gm.graph)
    assert (copy not in list(gm.graph.nodes)) == any_layout


def test_a_copy_that_is_returned_or_that_changes_no_layout_stays() -> None:
    x = torch.arange(32.0).view(4, 8)
    assert aten.clone.default in cleaned(lambda x: (x.t().contiguous(), x + 1), x)
    assert aten.clone.default in cleaned(lambda x: (x.t().contiguous().view(32), x + 1), x)
    gm = make_fx(lambda x: (ops.fixed_layout(x.clone(memory_format=torch.contiguous_format)),), tracing_mode="fake")(x)
    assert clean(gm.graph) == 1, "which Inductor's own clean-up knows"


def test_outputs_do_not_become_inputs_or_views_of_them_or_one_tensor() -> None:
    x = torch.randn(4, 8, dtype=BF16)

    def trip(x):
        return x.float().to(BF16)

    def kept(fn):
        return sum("cast" in str(t) or "_to_copy" in str(t) for t in cleaned(fn, x))

    assert len(cleaned(lambda x: (x.float().to(BF16), x.clone()), x)) >= 2
    assert kept(lambda x: (trip(x),)) == 2
    assert kept(lambda x: (trip(x.view(8, 4)),)) == 2, "a view of an input"
    assert kept(lambda x: (trip(x.view(8, 4).view(2, 16)),)) == 2
    assert kept(lambda x: (trip(ops.norm(x)),)) == 0, "a tensor that the graph makes, and returns once"
    assert kept(lambda x: (trip(y := ops.norm(x)), y)) == 2, "returned already"
    assert kept(lambda x: (trip(ops.norm(x)).view(-1),)) == 0
    assert kept(lambda x: (trip(x) * 2,)) == 0


@pytest.mark.parametrize(
    ("copied", "is_copy_of_a_layout"),
    [
        (lambda x: x.t().unsqueeze(0), True),
        (lambda x: x.t().unsqueeze(0).unsqueeze(-1).float(), True),
        (lambda x: x.view(2, 16), False),
        (lambda x: x.t() * 2, False),
    ],
)
def test_a_copy_of_a_transposed_tensor_is_one_behind_views_too(copied, is_copy_of_a_layout) -> None:
    def fn(x):
        return (ops.any_layout(copied(x).clone(memory_format=torch.contiguous_format)),)

    gm = make_fx(fn, tracing_mode="fake")(torch.arange(32.0).view(4, 8))
    (copy,) = gm.graph.find_nodes(op="call_function", target=aten.clone.default)
    assert (_needless_layout(copy) is copy.args[0]) == is_copy_of_a_layout
    assert not any(_needless_layout(node) for node in gm.graph.nodes if node is not copy)
    copy.replace_all_uses_with(copy.args[0])
    assert _needless_layout(copy) is None, "nobody reads it"


def test_a_copy_of_a_copy_is_no_copy_into_another_layout() -> None:
    def fn(x):
        return (ops.any_layout(x.t().clone(memory_format=torch.contiguous_format).clone()),)

    gm = make_fx(fn, tracing_mode="fake")(torch.arange(32.0).view(4, 8))
    first, second = gm.graph.find_nodes(op="call_function", target=aten.clone.default)
    assert _needless_layout(first) is first.args[0] and _needless_layout(second) is None


def test_the_pass_cleans_and_has_the_key_of_its_source() -> None:
    gm = make_fx(lambda x: (ops.norm(x.float().to(BF16)),), tracing_mode="fake")(torch.randn(4, 8, dtype=BF16))
    CleanupPass()(gm.graph)
    assert [node.target for node in gm.graph.nodes if node.op == "call_function"] == [ops.norm.default]
    assert CleanupPass().uuid() == get_hash_for_files((cleanup.__file__,))


def test_how_many_nodes_went() -> None:
    gm = make_fx(lambda x: (ops.norm(x.float().to(BF16)),), tracing_mode="fake")(torch.randn(4, 8, dtype=BF16))
    assert clean(gm.graph) == 2 and clean(gm.graph) == 0


def outputs(fn, merged=()):
    """The graph of fn, the owners of its outputs, and the outputs after nodes became one and were kept apart."""
    gm = make_fx(fn, tracing_mode="fake")(torch.randn(4, 8))
    owners = output_owners(gm.graph)
    calls = {node.name: node for node in gm.graph.nodes}
    for old, new in merged:
        calls[old].replace_all_uses_with(calls[new])
    keep_outputs_apart(gm.graph, owners)
    gm.graph.lint()
    gm.recompile()
    return gm, owners, gm(torch.ones(4, 8))


def test_what_was_two_tensors_is_returned_as_two() -> None:
    def fn(x):
        return x.exp(), x.exp().view(8, 4), x.log(), 3

    gm, owners, (first, second, third, number) = outputs(fn, merged=[("exp_1", "exp")])
    assert [owner and owner.name for owner in owners] == ["exp", "exp_1", "log", None]
    assert number == 3 and torch.equal(first.view(8, 4), second) and torch.equal(third, torch.zeros(4, 8))
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
    (copy,) = gm.graph.find_nodes(op="call_function", target=aten.clone.default)
    assert copy.next.op == "output", "made where it is returned"


def test_what_was_one_tensor_stays_one() -> None:
    gm, _, (first, second, third) = outputs(lambda x: (y := x.exp(), y.view(8, 4), y))
    assert gm.graph.find_nodes(op="call_function", target=aten.clone.default) == []
    assert first.data_ptr() == second.data_ptr() == third.data_ptr()


def test_a_graph_that_returns_one_tensor() -> None:
    gm, owners, out = outputs(lambda x: x.exp())
    assert [owner.name for owner in owners] == ["exp"] and torch.equal(out, torch.ones(4, 8).exp())
    assert gm.graph.find_nodes(op="call_function", target=aten.clone.default) == []


def test_the_pass_alone_takes_the_round_trip_out_of_a_compiled_graph() -> None:
    def fn(x):
        return ops.norm((x * 2).float().to(BF16).view(-1, 8))

    x = torch.randn(4, 8, dtype=BF16)
    torch._dynamo.reset()
    compiled = torch.compile(fn, options={"post_grad_custom_pre_pass": CleanupPass()})
    assert torch.equal(compiled(x), fn(x))
    assert CleanupPass().uuid() == CleanupPass().uuid() is not None
    assert CleanupPass() == CleanupPass()
