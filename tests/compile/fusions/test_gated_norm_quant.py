"""norm(x) * silu(z) of heads and an opaque quantization of the row become one op, exactly, or stay with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from shared import traced_graphs, vllm_ops
from shared.compare import assert_bitwise
from shared.inputs import weights
from shared.pass_harness import Outcome, exact, keeps_roundings, run_with_pass
from shared.traced_graphs import rewrite

import normquant as nq
from normquant.compile.fusions import gated_norm_quant
from normquant.compile.fusions.candidate import Rejection
from normquant.compile.policy import Rules
from normquant.spec import QuantSpec

M, H, D = 5, 4, 128
K, EPS = H * D, 1e-6
OP = "normquant.gated_norm_quant.default"
pytestmark = keeps_roundings
Inputs = tuple[torch.Tensor, ...]


def inputs(d: int = D, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    """x and z [M, H * D], whose sums of squares are exact, and a weight [D]."""
    return exact(M, H * d).to(dtype), exact(M, H * d, seed=1).to(dtype), weights(d, dtype)


def rms(h: torch.Tensor) -> torch.Tensor:
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)


def huggingface(x: torch.Tensor, z: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """As Qwen3NextRMSNormGated and its caller write it."""
    d = w.shape[0]
    h, gate = x.reshape(-1, d), z.reshape(-1, d)
    n = w * rms(h.float()).to(h.dtype)
    return (n * F.silu(gate.float())).to(x.dtype).reshape(x.shape)


def vllm(x: torch.Tensor, z: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """As RMSNormGated.forward_static of vLLM, norm before gate, and its caller."""
    h, gate = (t.view(x.shape[0], -1, w.shape[0]).float() for t in (x, z))
    return (rms(h) * w.float() * F.silu(gate)).to(x.dtype).flatten(-2)


def quantizing(gated: Callable[..., torch.Tensor], spec: QuantSpec | None = None) -> Callable[..., Any]:
    def fn(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q = nq.group_quant(gated(*args), spec=spec or QuantSpec())
        return q.data, q.scale

    return fn


def run(fn: Callable[..., Any], *args: torch.Tensor, policy: Any = "always", **options: Any) -> Outcome:
    return run_with_pass(fn, *args, rules=Rules(policy), **options)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize(("gated", "rounding"), [(huggingface, "twice"), (vllm, "none")])
def test_one_op_with_the_arithmetic_of_the_graph(
    gated: Any, rounding: str, d: int, dtype: torch.dtype, dynamic: bool
) -> None:
    args, fn = inputs(d, dtype), quantizing(gated)
    for rows in args[: 2 * dynamic]:
        torch._dynamo.mark_dynamic(rows, 0)
    outcome = run(fn, *args)
    site = outcome.site
    assert site.fused and (site.op, site.k) == ("gated_norm_quant", H * d), site.reason
    assert QuantSpec.decode(site.spec).rounding == rounding
    assert site.kernels_saved == 1 and site.bytes_saved == 2 * 2 * M * H * d
    assert OP in outcome.ops() and not [name for name in outcome.ops() if "rsqrt" in name]
    assert_bitwise(outcome.result, fn(*args))


@pytest.mark.parametrize("layout", ["row", "col", "col_tma"])
def test_vllms_quantization(layout: str) -> None:
    def fn(*args):
        return vllm_ops.per_token_group_fp8_quant(vllm(*args), layout=layout)

    result, (site,), left = traced_graphs.run(lambda graph: rewrite(graph, gated_norm_quant.find), fn, *inputs())
    assert site.fused and QuantSpec.decode(site.spec).layout == layout, site.reason
    assert [name for name in left if name.startswith("normquant")] == [OP]
    assert_bitwise(result, fn(*inputs()))


def test_a_weight_in_fp32() -> None:
    x, z, w = inputs()
    fn = quantizing(lambda x, z, w: (w * rms(heads(x).float()).to(x.dtype) * gate_of(z)).to(x.dtype).view(M, K))
    outcome = run(fn, x, z, w.float())
    assert outcome.site.fused and QuantSpec.decode(outcome.site.spec).rounding == "inner", outcome.site.reason
    assert_bitwise(outcome.result, fn(x, z, w.float()))


def heads(t: torch.Tensor) -> torch.Tensor:
    return t.view(t.shape[0], -1, D)


def test_rows_of_the_gate_may_be_apart() -> None:
    """z as a part of a wider projection, as vLLM has it."""
    x, _, w = inputs()
    wide = exact(M, 3 * K, seed=4)
    fn = quantizing(lambda x, wide, w: vllm(x, wide[:, K : 2 * K], w))
    outcome = run(fn, x, wide, w)
    assert outcome.site.fused and not [name for name in outcome.ops() if "clone" in name], outcome.site.reason
    assert_bitwise(outcome.result, fn(x, wide, w))


def test_more_dimensions() -> None:
    x, z, w = inputs()
    shape = (1, M, H, D)

    def fn(x, z, w):
        y = huggingface(x.reshape(-1, D), z.reshape(-1, D), w)
        q = nq.group_quant(y.reshape(1, M, -1))
        return q.data, q.scale

    outcome = run(fn, x.view(shape), z.view(shape), w)
    assert outcome.site.fused and outcome.site.k == K, outcome.site.reason
    assert_bitwise(outcome.result, fn(x.view(shape), z.view(shape), w))


def gate_of(z: torch.Tensor) -> torch.Tensor:
    return F.silu(heads(z).float())


def offset(x, z, w):
    return (rms(heads(x).float()) * (1 + w.float()) * gate_of(z)).to(x.dtype).view(M, K)


def one_gate_for_all_heads(x, z, w):
    return (rms(heads(x).float()) * w.float() * F.silu(heads(z)[:, :1].float())).to(x.dtype).view(M, K)


def unrounded_sum(x, z, w):
    return (rms(heads(x).float() + heads(z).float()) * w.float() * gate_of(z)).to(x.dtype).view(M, K)


def uneven_gate(x, z, w):
    wide = torch.cat((heads(z), heads(z)), -1)[..., :D]  # each head in front of something else
    return (rms(heads(x).float()) * w.float() * F.silu(wide.float())).to(x.dtype).view(M, K)


@pytest.mark.parametrize(
    ("gated", "words"),
    [
        (offset, "1.0 + weight; the kernel has the weight alone"),
        (one_gate_for_all_heads, "the gate is torch.bfloat16 (5, 1, 128), and what it gates (5, 4, 128)"),
        (unrounded_sum, "is of an unrounded sum"),
        (uneven_gate, "its rows are not evenly spaced"),
    ],
)
def test_what_the_kernel_lacks_stays(gated: Any, words: str) -> None:
    fn = quantizing(gated)
    outcome = run(fn, *(t.clone() for t in inputs()))
    assert words in outcome.site.reason and OP not in outcome.ops()
    assert_bitwise(outcome.result, fn(*(t.clone() for t in inputs())))


def test_heads_of_another_width_stay() -> None:
    x, z, w = exact(M, 384), exact(M, 384, seed=1), weights(96)
    outcome = run(quantizing(vllm), x, z, w)
    assert "it must be [D], D one of 16, 32" in outcome.site.reason
    assert_bitwise(outcome.result, quantizing(vllm)(x, z, w))


def test_a_norm_that_is_read_elsewhere_stays() -> None:
    def fn(x, z, w):
        n = w * rms(heads(x).float()).to(x.dtype)
        q = nq.group_quant((n * gate_of(z)).to(x.dtype).view(M, K))
        return q.data, q.scale, n

    outcome = run(fn, *inputs())
    assert "inside of the gated norm, is also read by" in outcome.site.reason
    assert_bitwise(outcome.result, fn(*inputs()))


@pytest.mark.parametrize("changed", ["rsqrt", "group_quant"])
def test_nothing_moves_across_an_operation_that_changes_a_tensor(changed: str) -> None:
    graph = run(quantizing(vllm), *inputs(), policy="never").graphs[0].graph
    x, *_ = graph.find_nodes(op="placeholder")
    with graph.inserting_before(next(node for node in graph.nodes if changed in str(node.target))):
        graph.call_function(torch.ops.aten.copy_.default, (x, x)).meta["val"] = x.meta["val"]
    (found,) = gated_norm_quant.find(graph)
    assert isinstance(found, Rejection)
    assert found.site.reason == "a tensor is changed in place between the norm and the quantization"


def sigmoid(x, z, w):
    return (rms(heads(x).float()) * w.float() * torch.sigmoid(heads(z).float())).to(x.dtype).view(M, K)


def no_norm(x, z, w):
    return (heads(x).float() * w.float() * gate_of(z)).to(x.dtype).view(M, K)


@pytest.mark.parametrize(("gated", "words"), [(sigmoid, "a gated norm"), (no_norm, "a gated product")])
def test_other_gates_are_no_site(gated: Any, words: str) -> None:
    fn = quantizing(gated)
    outcome = run(fn, *inputs())
    assert outcome.sites == [] and words in outcome.reports[0].others[0].reason
    assert_bitwise(outcome.result, fn(*inputs()))


def test_a_gate_before_the_norm_is_another_norm() -> None:
    """Mamba2's, which is one of the whole row."""
    fn = quantizing(lambda x, z, w: torch.cat([w] * H) * rms(x.float() * F.silu(z.float())).to(x.dtype))
    outcome = run(fn, *inputs())
    assert "the norm reads float32 (aten.mul)" in outcome.site.reason
    assert_bitwise(outcome.result, fn(*inputs()))


def test_an_epsilon_that_is_an_input() -> None:
    """Where torch.compile(dynamic=True) puts the floats of a module."""

    class Gated(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.eps = 1e-5

        def forward(self, x, z, w):
            h = heads(x).float()
            n = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
            q = nq.group_quant((n * w.float() * gate_of(z)).to(x.dtype).view(x.shape))
            return q.data, q.scale

    fn = Gated()
    args = inputs()
    for tensor in args:
        torch._dynamo.mark_static(tensor)
    outcome = run(fn, *args, dynamic=True)
    assert "normquant.gated_norm_quant.tensor" in outcome.ops()
    assert outcome.site.fused, outcome.site.reason
    assert_bitwise(outcome.result, fn(*inputs()))


@pytest.mark.parametrize(("policy", "words"), [("never", "policy never"), ("auto", "no measurements on cpu")])
def test_the_policy_decides_and_the_site_is_listed_once(policy: str, words: str) -> None:
    fn = quantizing(huggingface)
    outcome = run(fn, *inputs(), policy=policy)
    assert words in outcome.site.reason and not outcome.reports[0].others and OP not in outcome.ops()
    assert_bitwise(outcome.result, fn(*inputs()))
