"""The block-scaled GEMM on a GPU against the dequantized product."""

import pytest
import torch
from shared.inputs import activations

import normquant as nq
from normquant import BlockFP8Linear, QuantSpec, block_fp8_linear, quantize_weight
from normquant.linear import dequantized_linear, pad_weight_scale

MS = (0, 1, 2, 3, 4, 5, 7, 8, 16, 17, 64, 256)
COL_TMA = QuantSpec(layout="col_tma")
SPECS = [QuantSpec(layout="row"), QuantSpec(layout="col"), COL_TMA, COL_TMA.replace(scale="ue8m0")]


def weight_of(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, K] whose blocks' scales span three orders of magnitude: a scale in the wrong place is seen."""
    generator = torch.Generator("cuda").manual_seed(n + k)
    w = torch.randn(n, k, generator=generator, device="cuda")
    rows, columns = torch.arange(n, device="cuda") // 128, torch.arange(k, device="cuda") // 128
    return quantize_weight(w * torch.exp2((7 * rows.unsqueeze(1) + 3 * columns) % 10))


def x_of(m: int, k: int) -> torch.Tensor:
    groups = torch.arange(k) // 128 + 5 * torch.arange(m).unsqueeze(1)
    return (activations(m, k).float() * torch.exp2(groups % 7)).bfloat16().cuda()


def assert_close(out: torch.Tensor, q, weight: torch.Tensor, scale: torch.Tensor) -> None:
    """Within the rounding of the output and of the products' sum in the tensor cores."""
    expected = dequantized_linear(q.data, q.scale, weight, scale, torch.float32)
    x, w = q.dequantize().abs(), weight.float().abs()
    magnitude = x @ (w * scale.repeat_interleave(128, 0)[: len(w)].repeat_interleave(128, 1)).t()
    # bf16 rounds to 2**-8 of a value; Hopper's fp8 tensor cores keep 13 bits below the largest product they add
    bound = 2.0**-8 * expected.abs() + 2.0**-12 * magnitude
    error = (out.float() - expected).abs()
    assert (error <= bound).all(), f"{(error > bound).sum()} of {out.numel()} beyond the bound"
    off = (error.norm() / expected.norm()).item() if out.numel() else 0.0
    assert off < 2.0**-8, f"relative error {off:.2e}"


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.layout}-{s.scale}")
@pytest.mark.parametrize("k", [1536, 7168, 2304])
@pytest.mark.parametrize("n", [2112, 3072])
def test_every_m(n, k, spec):
    weight, scale = weight_of(n, k)
    for m in MS:
        q = nq.group_quant(x_of(m, k), spec=spec)
        for held in (scale, pad_weight_scale(scale)):
            out = block_fp8_linear(q, weight, held)
            assert out.shape == (m, n) and out.dtype == torch.bfloat16
            assert_close(out, q, weight, scale)


@pytest.mark.parametrize("m", [1, 5, 64])
def test_a_row_does_not_know_the_padding(m):
    # rows are padded to four for the GEMM: what stands in the padding must not reach the output
    weight, scale = weight_of(2112, 1536)
    x = x_of(64, 1536)
    together = block_fp8_linear(nq.group_quant(x), weight, scale)
    alone = block_fp8_linear(nq.group_quant(x[:m]), weight, scale)
    assert (together[:m].float() - alone.float()).abs().max() <= 2.0**-7 * together.float().abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_output_dtype(dtype):
    weight, scale = quantize_weight(torch.randn(2112, 1536, device="cuda"))
    for m in (3, 64):
        q = nq.group_quant(activations(m, 1536).cuda(), spec=COL_TMA)
        out = block_fp8_linear(q, weight, scale, out_dtype=dtype)
        assert out.dtype == dtype
        assert_close(out, q, weight, scale)


@pytest.mark.parametrize("n", [16, 128, 300, 576])
def test_every_n(n):
    weight, scale = weight_of(n, 1536)
    q = nq.group_quant(x_of(5, 1536), spec=COL_TMA)
    assert_close(block_fp8_linear(q, weight, scale), q, weight, scale)


def test_the_module_and_a_moved_one():
    torch.manual_seed(0)
    linear = torch.nn.Linear(2304, 2112, bias=True, dtype=torch.bfloat16)
    layer = BlockFP8Linear.from_linear(linear)
    x = activations(17, 2304)
    on_cpu = layer(x)
    on_gpu = layer.cuda()(x.cuda()).cpu()
    assert (on_gpu.float() - on_cpu.float()).norm() < 2.0**-8 * on_cpu.float().norm()


def test_cuda_graph():
    weight, scale = weight_of(2112, 7168)
    x = x_of(5, 7168)
    expected = block_fp8_linear(nq.group_quant(x, spec=COL_TMA), weight, scale)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = block_fp8_linear(nq.group_quant(x, spec=COL_TMA), weight, scale)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


def test_bad_inputs_stay_sentences():
    weight, scale = weight_of(2112, 1536)
    q = nq.group_quant(x_of(5, 1536))
    for call in (
        lambda: block_fp8_linear(q, weight, scale[:3]),
        lambda: block_fp8_linear(q, weight.cpu(), scale),
        lambda: block_fp8_linear(q, weight, scale, out_dtype=torch.int32),
    ):
        with pytest.raises(ValueError, match=r"weight|one device|out_dtype"):
            call()
