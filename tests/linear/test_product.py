"""The block-scaled product on CPU: against float64, its layouts, bad inputs."""

import pytest
import torch
from shared.compare import assert_bitwise, bits
from shared.inputs import activations, awkward
from shared.linear_weights import SIZES, SPECS, weight_of

import normquant as nq
from normquant import BlockFP8Linear, QuantizedActivation, QuantSpec, block_fp8_linear, quantize_weight
from normquant.linear import dequantized_linear, pad_weight_scale

U = 2.0**-24  # unit roundoff of fp32


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize(("n", "k"), SIZES)
@pytest.mark.parametrize("m", [0, 1, 5, 17])
def test_against_float64(m, n, k, spec):
    q = nq.group_quant(activations(m, k), spec=spec)
    weight, scale = quantize_weight(weight_of(n, k))
    out = block_fp8_linear(q, weight, scale, out_dtype=torch.float32)
    assert out.shape == (m, n) and out.dtype == torch.float32 and out.is_contiguous()
    x = q.data.double() * q.scales().double().repeat_interleave(128, 1)
    w = weight.double() * scale.double().repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)
    # each product is rounded three times (both scales, itself), a sum of K of them K - 1 times, in any order
    bound = (k + 2) * U * 1.01 * (x.abs() @ w.abs().t())
    assert ((out.double() - x @ w.t()).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_output_is_rounded_once(dtype):
    q = nq.group_quant(activations(5, 384))
    weight, scale = quantize_weight(torch.randn(300, 384, generator=torch.Generator().manual_seed(0)))
    wide = block_fp8_linear(q, weight, scale, out_dtype=torch.float32)
    assert_bitwise([block_fp8_linear(q, weight, scale, out_dtype=dtype)], [wide.to(dtype)])
    assert block_fp8_linear(q, weight, scale).dtype == torch.bfloat16


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_layout_of_the_scales_does_not_matter(spec):
    weight, scale = quantize_weight(weight_of(300, 384))
    row = nq.group_quant(activations(5, 384), spec=spec.replace(layout="row"))
    q = nq.group_quant(activations(5, 384), spec=spec)
    assert_bitwise([block_fp8_linear(q, weight, scale)], [block_fp8_linear(row, weight, scale)])


def test_nan_and_inf_reach_the_output():
    x = awkward(8, 384)
    out = BlockFP8Linear(*quantize_weight(weight_of(300, 384)))(x)
    bad = torch.tensor([4, 5])  # the rows with inf and NaN
    assert out[bad].isnan().all()
    assert not out[[0, 1, 2, 3, 7]].isnan().any()


def test_bias_does_not_change_the_dtype():
    q = nq.group_quant(activations(5, 384))
    out = block_fp8_linear(q, *quantize_weight(weight_of(300, 384)), torch.ones(300, dtype=torch.float32))
    assert out.dtype == torch.bfloat16


def quantized(spec: QuantSpec) -> QuantizedActivation:
    return nq.group_quant(activations(5, 384), spec=spec)


PACKED = QuantSpec(scale="ue8m0_packed", layout="col_tma")
W, S = quantize_weight(weight_of(300, 384))
X = nq.group_quant(activations(5, 384))
FLAT = (X.data, X.scale)
OP = torch.ops.normquant.block_fp8_linear
BAD = {
    "packed scales": (lambda: block_fp8_linear(quantized(PACKED), W, S), "'ue8m0_packed'", "fp32 or ue8m0"),
    "group 64": (lambda: block_fp8_linear(quantized(QuantSpec(group=64)), W, S), "group 64", "128"),
    "bf16 weight": (lambda: block_fp8_linear(X, W.bfloat16(), S), "bfloat16", "float8_e4m3fn"),
    "1-D weight": (lambda: block_fp8_linear(X, W[0], S), "(384,)", "[N, K]"),
    "weight of other K": (lambda: block_fp8_linear(X, W[:, :256].contiguous(), S[:, :2]), "256", "128"),
    "weight apart": (lambda: block_fp8_linear(X, W.t().contiguous().t(), S), "(1, 300)", "contiguous"),
    "scale of other N": (lambda: block_fp8_linear(X, W, S[:2]), "(2, 3)", "(3, 3)"),
    "bf16 scale": (lambda: block_fp8_linear(X, W, S.bfloat16()), "bfloat16", "float32"),
    "integer output": (lambda: block_fp8_linear(X, W, S, out_dtype=torch.int32), "int32", "bfloat16"),
    "short bias": (lambda: block_fp8_linear(X, W, S, torch.ones(1)), "(1,)", "[300]"),
    "2-D bias": (lambda: block_fp8_linear(X, W, S, torch.ones(5, 300)), "(5, 300)", "[300]"),
    "weight elsewhere": (lambda: block_fp8_linear(X, W.to("meta"), S), "meta", "one device"),
    "scale elsewhere": (lambda: block_fp8_linear(X, W, S.to("meta")), "meta", "one device"),
    "scale of other M": (lambda: OP(X.data, X.scale[:4], W, S, torch.bfloat16), "(4, 3)", "(5, 3)"),
    "bf16 data": (lambda: OP(X.data.bfloat16(), X.scale, W, S, torch.bfloat16), "bfloat16", "float8_e4m3fn"),
    "module of K = 192": (lambda: BlockFP8Linear(*quantize_weight(torch.ones(300, 192))), "192", "multiple of 128"),
    "module of K = 0": (lambda: BlockFP8Linear(*quantize_weight(torch.ones(300, 0))), "K = 0", "multiple of 128"),
    "module of group 64": (lambda: BlockFP8Linear(W, S, spec=QuantSpec(group=64)), "group 64", "128"),
    "module of float64 scale": (lambda: BlockFP8Linear(W, S.double()), "float64", "float32"),
    "0-dimensional x": (lambda: BlockFP8Linear(W, S)(torch.ones((), dtype=torch.bfloat16)), "0-dim", "[..., K]"),
    "float64 x": (lambda: BlockFP8Linear(W, S)(torch.ones(5, 384).double()), "float64", "bfloat16"),
    "x of other K": (lambda: BlockFP8Linear(W, S)(activations(5, 256)), "256", "384"),
    "module of bf16": (lambda: BlockFP8Linear(W.bfloat16(), S), "bfloat16", "float8_e4m3fn"),
    "module of other scale": (lambda: BlockFP8Linear(W, S[:, :2]), "(3, 2)", "(3, 3)"),
    "1-D weight to quantize": (lambda: quantize_weight(torch.ones(128)), "(128,)", "[N, K]"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_inputs(name):
    call, given, accepted = BAD[name]
    with pytest.raises(ValueError) as error:
        call()
    assert given in str(error.value) and accepted in str(error.value), str(error.value)


# the op's own, on meta tensors: a fake that accepts more than the op lets a wrong graph compile
@pytest.mark.parametrize(
    "name", ["bf16 weight", "weight of other K", "scale of other N", "integer output", "scale of other M", "bf16 data"]
)
def test_bad_inputs_of_the_fake(name):
    n, k, m = 300, 384, 5
    good = {
        "data": torch.empty(m, k, dtype=torch.float8_e4m3fn, device="meta"),
        "scale": torch.empty(m, 3, device="meta"),
        "weight": torch.empty(n, k, dtype=torch.float8_e4m3fn, device="meta"),
        "weight_scale": torch.empty(3, 3, device="meta"),
        "out_dtype": torch.bfloat16,
    }
    assert OP(**good).shape == (m, n)
    wrong = {
        "bf16 weight": {"weight": good["weight"].bfloat16()},
        "weight of other K": {"weight": good["weight"].new_empty(n, 256), "weight_scale": good["weight_scale"][:, :2]},
        "scale of other N": {"weight_scale": good["weight_scale"][:2]},
        "integer output": {"out_dtype": torch.int32},
        "scale of other M": {"scale": good["scale"][:4]},
        "bf16 data": {"data": good["data"].bfloat16()},
    }[name]
    with pytest.raises(ValueError):
        OP(**(good | wrong))


# All but test_schema, which compares inputs with allclose; torch has none for fp8. What it checks is checked below.
CHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_opcheck(spec):
    for m, n, out_dtype in ((5, 300, torch.bfloat16), (1, 128, torch.float32), (0, 300, torch.float16)):
        q = nq.group_quant(activations(m, 384), spec=spec)
        weight, scale = quantize_weight(weight_of(n, 384))
        args = (q.data, q.scale, weight, pad_weight_scale(scale), out_dtype)
        before = [bits(t).clone() for t in args[:4]]
        torch.library.opcheck(OP.default, args, test_utils=CHECKS)
        assert all(torch.equal(bits(t), b) for t, b in zip(args[:4], before, strict=True))


def test_the_op_is_the_dequantized_product():
    assert_bitwise([OP(*FLAT, W, S, torch.bfloat16)], [dequantized_linear(*FLAT, W, S, torch.bfloat16)])


def test_autocast_does_not_change_the_product():
    expected = OP(*FLAT, W, S, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert_bitwise([OP(*FLAT, W, S, torch.float32)], [expected])
