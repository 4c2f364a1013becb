"""silu(gate) * up and vLLM's opaque quantization become one op, exactly, or stay with a reason."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Interpreter

from normquant.compile import Site
from normquant.compile.policy import Rules
from normquant.integrations.silu_quant import fuse_silu_quant
from normquant.spec import QuantSpec


def _vllm_ops() -> Any:
    """The stand-ins for vLLM's operations, which may be registered only once in a process."""
    found = [module for name, module in sys.modules.items() if name.endswith("compile.vllm_ops")]
    if found:
        return found[0]
    name = "tests.compile.vllm_ops"
    path = Path(__file__).parents[1] / "compile" / "vllm_ops.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


vllm_ops = _vllm_ops()
K = 256


def run(fn: Callable[..., Any], *args: torch.Tensor, policy: str = "always", dynamic: bool = False) -> tuple:
    """What fn returns with its graph rewritten and run eagerly, the sites, and the operations that are left."""
    sites: list[Site] = []
    left: list[str] = []

    def inner(gm: GraphModule, inputs: Any, **_: Any) -> Callable[[list[Any]], Any]:
        sites.extend(fuse_silu_quant(gm.graph, Rules(policy)))  # type: ignore[arg-type]
        gm.graph.lint()
        gm.recompile()
        left.extend(str(node.target) for node in gm.graph.nodes if node.op == "call_function")

        def call(inputs: list[Any]) -> Any:
            return Interpreter(gm).run(*inputs)

        call._boxed_call = True  # type: ignore[attr-defined]
        return call

    def backend(gm: GraphModule, inputs: list[Any]) -> Any:
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(gm, inputs, inner_compile=inner)

    torch._dynamo.reset()
    if dynamic:
        for arg in args:
            torch._dynamo.mark_dynamic(arg, 0)
    with torch.no_grad(), torch._inductor.config.patch(enable_auto_functionalized_v2=False):  # as vLLM sets it
        return torch.compile(fn, backend=backend)(*args), sites, left


def gate_up(m: int = 5, k: int = K, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(m, 2 * k, generator=torch.Generator().manual_seed(0)).to(dtype)


def activation(x: torch.Tensor) -> torch.Tensor:
    d = x.shape[-1] // 2
    return F.silu(x[..., :d]) * x[..., d:]


def halves(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return up * F.silu(gate)


def assert_equal(given: Any, expected: Any) -> None:
    for a, b in zip(given, expected, strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a.float(), b.float())


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
