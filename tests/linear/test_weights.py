"""Block-FP8 weights: their values and layout, and the dequantized weight as a tensor."""

import pytest
import torch
from shared.compare import assert_bitwise
from shared.linear_weights import SIZES, weight_of

from normquant.linear import DequantizedWeight, dequantize_weight, pad_weight_scale, quantize_weight

U = 2.0**-24  # unit roundoff of fp32


def blocks(n: int, k: int):
    return [(slice(i, i + 128), slice(j, j + 128)) for i in range(0, n, 128) for j in range(0, k, 128)]


@pytest.mark.parametrize(("n", "k"), [*SIZES, (300, 200)])
def test_quantized_weight_is_half_a_step_away(n, k):
    w = weight_of(n, k)
    data, scale = quantize_weight(w)
    assert data.shape == (n, k) and data.dtype == torch.float8_e4m3fn and data.is_contiguous()
    assert scale.shape == (-(-n // 128), -(-k // 128)) and scale.dtype == torch.float32
    for (rows, columns), s in zip(blocks(n, k), scale.flatten(), strict=True):
        part = w[rows, columns].double()
        largest = part.abs().max()
        assert abs(s.item() * 448 / largest - 1) <= 2 * U if largest else s == torch.tensor(1e-10) / 448
        q = part / s.double()
        step = torch.exp2(q.abs().clamp(2.0**-6, 448).log2().floor() - 3)
        assert ((data[rows, columns].double() - q).abs() <= step / 2 + 2 * U * q.abs()).all()


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_a_weight_is_its_value_times_its_blocks_scale(n, k):
    # the layout of DeepSeek's checkpoints: weight_scale_inv[i, j] belongs to rows 128 i.. and columns 128 j..
    data, scale = quantize_weight(weight_of(n, k))
    expected = torch.empty(n, k)
    for i, j in torch.cartesian_prod(torch.arange(scale.shape[0]), torch.arange(scale.shape[1])).tolist():
        rows, columns = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
        expected[rows, columns] = data[rows, columns].float() * scale[i, j]
    assert_bitwise([dequantize_weight(data, scale)], [expected])


@pytest.mark.parametrize("k", [128, 384, 512, 2304])
def test_padded_scale_is_the_scale(k):
    _, scale = quantize_weight(weight_of(300, k))
    padded = pad_weight_scale(scale)
    assert torch.equal(padded, scale) and padded.shape == scale.shape
    assert padded.stride(1) == 1 and padded.stride(0) % 4 == 0
    whole = padded.as_strided((scale.shape[0], padded.stride(0)), padded.stride())
    assert not whole[:, scale.shape[1] :].any()


def weight(dtype: torch.dtype = torch.bfloat16) -> DequantizedWeight:
    return DequantizedWeight(*quantize_weight(weight_of(300, 384)), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_questions_about_a_weight_read_no_values(dtype, monkeypatch):
    w = weight(dtype)
    monkeypatch.setattr(DequantizedWeight, "dense", lambda self: pytest.fail("values were read"))
    assert w.dtype == dtype and w.device.type == "cpu" and w.shape == (300, 384) and w.stride() == (384, 1)
    assert w.data.dtype == dtype and w.numel() == 300 * 384 and w.is_floating_point() and not w.requires_grad
    assert isinstance(w, torch.Tensor) and str(dtype) in repr(w)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_an_op_reads_the_dequantized_values(dtype):
    w = weight(dtype)
    dense = dequantize_weight(*quantize_weight(weight_of(300, 384))).to(dtype)
    x = torch.randn(5, 384, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert_bitwise([w.clone(), w[3], w.t() + 1], [dense, dense[3], dense.t() + 1])
    assert_bitwise([torch.nn.functional.linear(x, w)], [torch.nn.functional.linear(x, dense)])
    assert_bitwise([torch.empty(300, 384, dtype=dtype).copy_(w)], [dense])  # the weight is read, not written
    assert_bitwise([torch.mm(x, w.t(), out=torch.empty(5, 300, dtype=dtype))], [x @ dense.t()])


WRITES = {
    "data.normal_": lambda w: w.data.normal_(),
    "copy_": lambda w: w.copy_(torch.ones(300, 384)),
    "init": lambda w: torch.nn.init.kaiming_uniform_(w),
    "row": lambda w: w.__setitem__(0, 1.0),
    "out=": lambda w: torch.add(torch.ones(300, 384), 1, out=w),
    "data_ptr": lambda w: w.data_ptr(),  # a kernel would be given a null pointer
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_is_an_error_and_never_lost(write):
    with pytest.raises(RuntimeError, match="weight of a BlockFP8Linear"):
        write(weight())
