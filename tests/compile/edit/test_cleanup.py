"""Identities, cast round trips and copies that a graph does not need."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from normquant.compile.edit.cleanup import CleanupPass, clean

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


def test_outputs_do_not_become_inputs() -> None:
    x = torch.randn(4, 8, dtype=BF16)
    assert len(cleaned(lambda x: (x.float().to(BF16), x.clone()), x)) >= 2


def test_the_pass_alone_takes_the_round_trip_out_of_a_compiled_graph() -> None:
    def fn(x):
        return ops.norm((x * 2).float().to(BF16).view(-1, 8))

    x = torch.randn(4, 8, dtype=BF16)
    torch._dynamo.reset()
    compiled = torch.compile(fn, options={"post_grad_custom_pre_pass": CleanupPass()})
    assert torch.equal(compiled(x), fn(x))
    assert CleanupPass().uuid() == CleanupPass().uuid() is not None
    assert CleanupPass() == CleanupPass()
