"""The rule of FlashInfer's linear kernel, and products of data quantized so, against FlashInfer and vLLM where they are
installed: equal to the bit."""

from __future__ import annotations

import pytest
import torch
from shared.compare import assert_bitwise
from shared.inputs import activations, awkward

from normquant import reference, specs
from normquant.spec import QuantSpec

FEW_AND_MANY = specs.VLLM_UE8M0.replace(layout="col_tma", few_rows=32)
SHAPES = ((7168, 2112), (1536, 3072), (2304, 7168), (2048, 7168), (7168, 4608))  # K, N of DeepSeek-R1 at TP8


def quantized(x: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
    data, scale = torch.ops.normquant.group_quant(x, spec.encode())
    return data, scale


def every_amax() -> torch.Tensor:
    """A group for each bf16 that is a group's amax, from zero to inf, with smaller values beside it."""
    amax = torch.arange(0, 0x7F81, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    amax = torch.cat([amax, amax.new_zeros(-len(amax) % 56)])
    groups = torch.zeros(len(amax), 128, dtype=torch.bfloat16)
    groups[:, 0], groups[:, 1], groups[:, 2] = amax, amax * 0.37, amax * -0.011
    return groups.view(-1, 7168).cuda()


@pytest.mark.parametrize("m", [1, 31, 32, 300])
def test_the_kernel_has_the_bits_of_the_reference(m: int) -> None:
    for spec in (specs.FLASHINFER_LINEAR, FEW_AND_MANY):
        x = awkward(m, 1536).cuda()
        assert_bitwise(quantized(x, spec), reference.group_quant(x, spec))


def test_every_amax_has_the_bits_of_the_reference() -> None:
    x = every_amax()
    assert_bitwise(quantized(x, specs.FLASHINFER_LINEAR), reference.group_quant(x, specs.FLASHINFER_LINEAR))


def test_flashinfer_quantizes_so() -> None:
    gemm = pytest.importorskip("flashinfer.gemm.gemm_base", reason="FlashInfer is not installed")
    runner = gemm.get_fp8_blockscale_gemm_runner_sm90()
    special = awkward(64, 7168).cuda()
    wide = (torch.randn(64, 7168, device="cuda") * torch.randn(64, 7168, device="cuda").mul(6).exp()).bfloat16()
    for x in (every_amax(), special, wide, activations(64, 7168).cuda()):
        data = torch.empty_like(x, dtype=torch.float8_e4m3fn)
        scale = torch.zeros(x.shape[1] // 128, (len(x) + 3) // 4 * 4, device="cuda")
        runner.fp8_quantize_1x128(x, data, scale, False)
        assert_bitwise(quantized(x, specs.FLASHINFER_LINEAR), (data, scale.t()[: len(x)]))


@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_a_product_is_that_of_vllms_operator(k: int, n: int) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    pytest.importorskip("flashinfer", reason="FlashInfer is not installed")
    import vllm.model_executor.kernels.linear.scaled_mm.flashinfer  # noqa: F401  # defines the operator

    from normquant.vllm import fp8_linear

    assert fp8_linear.lacks() is None
    weight = (torch.randn(n, k, device="cuda") * 0.5).to(torch.float8_e4m3fn)
    scale = torch.exp2(torch.randint(-3, 3, ((n + 127) // 128, k // 128), device="cuda").float())
    for m in (*range(1, 65), 100, 128, 300):
        x = activations(m, k, seed=m).cuda()
        if m > 3:
            x[2] = 0
        expected = torch.ops.vllm.dynamic_flashinfer_deepgemm_blockscale_gemm(x, weight, scale, 128, True)
        data, s = quantized(x, FEW_AND_MANY)
        got = torch.ops.normquant_vllm.block_fp8_linear(data, s, weight, scale, 32, True)
        assert torch.equal(got, expected), m


@pytest.mark.parametrize(("k", "n"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_vllms_other_linears(k: int, n: int, dtype: torch.dtype) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from vllm import _custom_ops
    from vllm.model_executor.kernels.linear.scaled_mm import deep_gemm  # noqa: F401  # defines the operator

    from normquant.vllm import fp8_linear  # noqa: F401  # so does this

    weight = (torch.randn(n, k, device="cuda") * 0.5).to(torch.float8_e4m3fn)
    scale = torch.exp2(torch.randint(-3, 3, ((n + 127) // 128, k // 128), device="cuda").float())
    for m in (1, 2, 5, 16, 17, 64, 300):
        x = activations(m, k, seed=m).cuda()
        data, s = quantized(x, specs.VLLM.replace(layout="col"))
        expected = _custom_ops.cutlass_scaled_mm(data, weight.T, s, scale.T, dtype)
        got = torch.ops.normquant_vllm.cutlass_block_fp8_linear(data, s, weight, scale, dtype == torch.float16)
        assert torch.equal(got, expected), m
        if dtype == torch.bfloat16:
            data, s = quantized(x, specs.VLLM_UE8M0.replace(layout="col_tma"))
            expected = torch.empty_like(got)
            torch.ops.vllm.fp8_gemm_nt_op(data, s, weight, scale, expected, True)
            assert torch.equal(torch.ops.normquant_vllm.block_fp8_linear(data, s, weight, scale, 0, True), expected), m
