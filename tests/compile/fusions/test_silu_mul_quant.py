"""silu(gate) * up and vLLM's opaque quantization become one op, exactly, or stay with a reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from shared import traced_graphs, vllm_ops
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


def test_a_product_that_is_read_elsewhere_stays() -> None:
    def fn(x):
        y = activation(x)
        return *vllm_ops.per_token_group_fp8_quant(y), y.float().sum()

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
