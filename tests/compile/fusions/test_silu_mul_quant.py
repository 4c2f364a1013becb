"""silu(gate) * up and vLLM's opaque quantization become one op, exactly, or stay with a reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from shared import traced_graphs, vllm_ops
from shared.compare import assert_bitwise
from shared.inputs import awkward
from shared.pass_harness import keeps_roundings
from shared.traced_graphs import assert_equal, rewrite

from normquant.compile.fusions import silu_mul_quant
from normquant.spec import QuantSpec

K = 256


def run(fn: Any, x: torch.Tensor, policy: Any = "always", dynamic: bool = False) -> tuple:
    return traced_graphs.run(lambda graph: rewrite(graph, silu_mul_quant.find, policy), fn, x, dynamic=dynamic)


def gate_up(m: int = 5, k: int = K, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(m, 2 * k, generator=torch.Generator().manual_seed(0)).to(dtype)


def activation(x: torch.Tensor) -> torch.Tensor:
    d = x.shape[-1] // 2
    return F.silu(x[..., :d]) * x[..., d:]


def halves(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return up * F.silu(gate)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("layout", ["row", "col", "col_tma"])
@pytest.mark.parametrize("act", [activation, halves])
def test_one_op_with_the_arithmetic_of_the_graph(act: Any, layout: str, ue8m0: bool, dtype: Any, dynamic: bool) -> None:
    def fn(x):
        return vllm_ops.per_token_group_fp8_quant(act(x), layout=layout, ue8m0=ue8m0)

    result, (site,), left = run(fn, gate_up(dtype=dtype), dynamic=dynamic)
    assert site.fused, site.reason
    spec = QuantSpec.decode(site.spec)
    assert (spec.rounding, spec.layout, spec.is_ue8m0) == ("twice", layout, ue8m0)
    assert "normquant.silu_mul_quant.default" in left
    assert not [name for name in left if "auto_functionalized" in name or "exp" in name]
    assert_equal(result, fn(gate_up(dtype=dtype)))


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda x: F.silu(x[..., K:]) * x[..., :K], "gate is not the first half"),
        (lambda x: F.silu(x[..., :K]) * x[..., :K].flip(0), "not the two halves of one tensor"),
        (lambda x: F.silu(x[..., : K // 2]) * x[..., K // 2 : K], "not the two halves of one tensor"),
    ],
)
def test_what_the_kernel_lacks_stays(act: Any, words: str) -> None:
    def fn(x):
        return vllm_ops.per_token_group_fp8_quant(act(x))

    result, (site,), left = run(fn, gate_up())
    assert words in site.reason and not [name for name in left if name.startswith("normquant")]
    assert_equal(result, fn(gate_up()))


@pytest.mark.parametrize(
    "act", [lambda x: F.gelu(x[..., :K]) * x[..., K:], lambda x: torch.sigmoid(x[..., :K]) * x[..., K:]]
)
def test_other_activations_are_no_site(act: Any) -> None:
    def fn(x):
        return vllm_ops.per_token_group_fp8_quant(act(x))

    result, sites, _ = run(fn, gate_up())
    assert sites == []
    assert_equal(result, fn(gate_up()))


def clamped(x: torch.Tensor, limit: float, up: tuple[float | None, float | None] | None = None) -> torch.Tensor:
    """The product of DeepSeek-V4's MLP."""
    gate, second = x.chunk(2, dim=-1)
    low, high = (-limit, limit) if up is None else up
    return F.silu(gate.clamp(max=limit)) * second.clamp(low, high)


def op_of(left: list[str]) -> list[str]:
    return [name for name in left if name.startswith("normquant")]


@keeps_roundings
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("limit", [10.0, 0.3])
def test_clamps_go_into_the_op(limit: float, dtype: Any, dynamic: bool) -> None:
    def fn(x):
        return vllm_ops.per_token_group_fp8_quant(clamped(x, limit))

    x = awkward(9, 2 * K, dtype)  # NaN, inf and values beyond the limit among them
    result, (site,), left = run(fn, x, dynamic=dynamic)
    assert site.fused, site.reason
    assert op_of(left) == ["normquant.silu_mul_quant.default"] and not [name for name in left if "clamp" in name]
    assert_bitwise(result, fn(x))


@keeps_roundings
def test_transformers_deepseek_v4() -> None:
    models = pytest.importorskip("transformers.models.deepseek_v4")
    mlp = models.modeling_deepseek_v4.DeepseekV4MLP(models.DeepseekV4Config(hidden_size=K, intermediate_size=K))
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = Part(slice(0, K)), Part(slice(K, 2 * K)), torch.nn.Identity()

    def fn(x):
        return vllm_ops.per_token_group_fp8_quant(mlp(x))

    x = gate_up() * 20
    result, (site,), left = run(fn, x)
    assert mlp.limit == 10.0 and site.fused, site.reason
    assert op_of(left) == ["normquant.silu_mul_quant.default"]
    assert_equal(result, fn(x))


class Part(torch.nn.Module):
    """Columns of a projection that has been merged with another one."""

    def __init__(self, columns: slice) -> None:
        super().__init__()
        self.columns = columns

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., self.columns]


@keeps_roundings
@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda x: clamped(x, 7.0, (-7.0, 8.0)), "clamped to [, 7.0] and up to [-7.0, 8.0]; the kernel has [, L]"),
        (lambda x: clamped(x, 7.0, (None, 7.0)), "up to [, 7.0]"),
        (lambda x: F.silu(x[..., :K]) * x[..., K:].clamp(-7, 7), "gate is clamped to [, ] and up to [-7.0, 7.0]"),
        (lambda x: F.silu(x[..., :K].clamp(max=7)) * x[..., K:], "gate is clamped to [, 7.0] and up to [, ]"),
        (lambda x: F.silu(x[..., :K].clamp(-7, 7)) * x[..., K:].clamp(-7, 7), "gate is clamped to [-7.0, 7.0]"),
        (lambda x: clamped(x, -7.0, (7.0, -7.0)), "limit is -7.0"),
        # vLLM's SiluAndMulWithClamp in torch, and that of gpt-oss
        (lambda x: sigmoid_product(x, 1.0, 0.0), "silu is g * sigmoid(g), whose sigmoid is rounded to bfloat16"),
        (lambda x: sigmoid_product(x, 1.702, 1.0), "its gate is g * sigmoid(1.702 * g)"),
    ],
)
def test_other_clamps_and_gates_stay(act: Any, words: str) -> None:
    def fn(x):
        return vllm_ops.per_token_group_fp8_quant(act(x))

    result, (site,), left = run(fn, gate_up())
    assert words in site.reason and op_of(left) == []
    assert_equal(result, fn(gate_up()))


def sigmoid_product(x: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    gate, up = x[..., :K].clamp(max=7.0), x[..., K:].clamp(-7.0, 7.0)
    return gate * torch.sigmoid(alpha * gate) * (up + beta)


@keeps_roundings
def test_a_limit_that_is_computed_stays() -> None:
    def fn(x, limit):
        gate, up = x[..., :K], x[..., K:]
        return vllm_ops.per_token_group_fp8_quant(F.silu(torch.minimum(gate, limit)) * up)

    x, limit = gate_up(), torch.tensor(7.0, dtype=torch.bfloat16)
    result, (site,), _ = traced_graphs.run(lambda graph: rewrite(graph, silu_mul_quant.find, "always"), fn, x, limit)
    assert "not the two halves" in site.reason
    assert_equal(result, fn(x, limit))


@pytest.mark.parametrize("reader", [lambda y: y.float().sum(), lambda y: y], ids=["sum", "output"])
def test_a_product_that_is_read_elsewhere_stays(reader: Any) -> None:
    def fn(x):
        y = activation(x)
        return *vllm_ops.per_token_group_fp8_quant(y), reader(y)

    result, (site,), _ = run(fn, gate_up())
    assert "is also read by" in site.reason
    assert_equal(result[:2], fn(gate_up())[:2])


def test_the_policy_decides() -> None:
    def fn(x):
        return vllm_ops.per_token_group_fp8_quant(activation(x))

    for policy, words in (("never", "policy never"), ("auto", "no measurements on cpu")):
        result, (site,), left = run(fn, gate_up(), policy=policy)
        assert words in site.reason and not [name for name in left if name.startswith("normquant")]
        assert_equal(result, fn(gate_up()))
