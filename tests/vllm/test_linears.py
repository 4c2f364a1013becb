"""vLLM's own block-FP8 linears that write into a tensor: what their code puts into a graph is paired, and for a product
that is not split vLLM's kernel is called as before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from shared import traced_graphs
from shared.compare import assert_bitwise
from shared.inputs import activations
from shared.unsplit_pairs import UnsplitPairs

import normquant as nq
from normquant.compile import driver
from normquant.compile.fusions import product_pair
from normquant.compile.policy import Rules
from normquant.linear import ProductChoice, dequantized_linear, quantize_weight
from normquant.vllm import fp8_linear

K, N = 512, 768
WEIGHT, SCALE = quantize_weight(torch.randn(N, K, generator=torch.Generator().manual_seed(0)) / 16)
CUTLASS = "cutlass_scaled_mm(Tensor! out, Tensor a, Tensor b, Tensor a_scales, Tensor b_scales, Tensor? bias) -> ()"
Given = list[tuple[Any, ...]]


def shapes(*args: Any) -> tuple[Any, ...]:
    """Arguments, with the layouts and dtypes of tensors in place of their values."""
    return tuple((a.shape, a.stride(), a.dtype) if isinstance(a, torch.Tensor) else a for a in args)


@pytest.fixture(scope="module", autouse=True)
def on_cpu() -> Iterator[None]:
    """vLLM's kernels need a GPU. The code around them runs here, on products in fp32."""
    library = torch.library.Library("normquant_vllm", "IMPL", "CPU")
    for name in ("block_fp8_linear", "cutlass_block_fp8_linear"):
        library.impl(name, getattr(fp8_linear, name))
    yield
    library._destroy()


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product was measured to be faster for some number of rows, which are not those of a call on a CPU."""
    monkeypatch.setattr(product_pair, "pays", lambda *args: ProductChoice(True, "measured"))


@pytest.fixture
def deepgemm_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Given]:
    """What vLLM's DeepGEMM function was given, in turn."""
    from vllm.model_executor.kernels.linear.scaled_mm import deep_gemm
    from vllm.utils import deep_gemm as functions

    calls: Given = []

    def fp8_gemm_nt(a: Any, b: Any, out: torch.Tensor, *, is_deep_gemm_e8m0_used: bool) -> None:
        calls.append(shapes(*a, *b, out, is_deep_gemm_e8m0_used))
        out.copy_(dequantized_linear(*a, *b, out.dtype))

    fp8_linear._deepgemm.cache_clear()
    for module in (deep_gemm, functions):
        monkeypatch.setattr(module, "fp8_gemm_nt", fp8_gemm_nt)
    yield calls
    fp8_linear._deepgemm.cache_clear()


@pytest.fixture
def cutlass_calls() -> Iterator[Given]:
    """What Cutlass's operation was given, in turn; a vLLM for a CPU has none."""
    calls: Given = []

    def scaled_mm(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, sa: Any, sb: Any, bias: Any) -> None:
        calls.append(shapes(out, a, b, sa, sb, bias))
        out.copy_(dequantized_linear(a, sa, b.t(), sb.t(), out.dtype))

    library = torch.library.Library("_C", "FRAGMENT")
    library.define(CUTLASS)
    library.impl("cutlass_scaled_mm", scaled_mm, "CPU")
    torch.library.register_fake("_C::cutlass_scaled_mm", lambda *args: None, lib=library)
    yield calls
    library._destroy()


def layer(kernel: Any, layout: Any) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]]:
    def fn(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q = nq.group_quant(x, spec=nq.QuantSpec(layout=layout, scale="ue8m0"))
        gated = nq.silu_mul_quant(kernel.apply_block_scaled_mm(q.data, WEIGHT, q.scale, SCALE))
        return gated.data, gated.scale

    return fn


def assert_same_calls(fn: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], calls: Given, otherwise: str) -> None:
    x = activations(5, K)
    expected = fn(x)
    (own,) = calls
    gm, inputs = traced_graphs.traced(fn, x)
    (site,) = driver.run(gm.graph, Rules("always"), strict=True, fusions=driver.VLLM_FUSIONS).sites
    assert site.fused, site.reason
    gm.recompile()
    calls.clear()
    graph = UnsplitPairs(gm)
    assert_bitwise(graph.run(*inputs), expected)
    assert graph.otherwise == [otherwise] and calls == [own]


@pytest.mark.parametrize("e8m0", [False, True])
def test_deepgemm(deepgemm_calls: Given, e8m0: bool) -> None:
    from vllm.model_executor.kernels.linear.scaled_mm.deep_gemm import DeepGemmFp8BlockScaledMMKernel

    kernel = object.__new__(DeepGemmFp8BlockScaledMMKernel)
    kernel.config = SimpleNamespace(out_dtype=torch.bfloat16)
    kernel.use_deep_gemm_e8m0 = e8m0
    assert_same_calls(layer(kernel, "col_tma"), deepgemm_calls, f"normquant_vllm::block_fp8_linear 0 {int(e8m0)}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cutlass(cutlass_calls: Given, dtype: torch.dtype) -> None:
    from vllm.model_executor.kernels.linear.scaled_mm.cutlass import CutlassFp8BlockScaledMMKernel

    kernel = object.__new__(CutlassFp8BlockScaledMMKernel)
    kernel.config = SimpleNamespace(out_dtype=dtype)
    otherwise = f"normquant_vllm::cutlass_block_fp8_linear {int(dtype == torch.float16)}"
    assert_same_calls(layer(kernel, "col"), cutlass_calls, otherwise)
