"""The block-FP8 linear layer on CPU: against float64, its weights' layout, its module, bad inputs."""

import copy
import io

import pytest
import torch
from shared.compare import assert_bitwise, bits
from shared.inputs import activations, awkward
from torch.utils._python_dispatch import TorchDispatchMode

import normquant as nq
from normquant import BlockFP8Linear, QuantizedActivation, QuantSpec, block_fp8_linear, quantize_weight
from normquant.linear import dequantize_weight, dequantized_linear, pad_weight_scale

U = 2.0**-24  # unit roundoff of fp32
SPECS = {
    f"{scale}-{layout}": QuantSpec(scale=scale, layout=layout)
    for scale in ("fp32", "ue8m0")
    for layout in ("row", "col", "col_tma")
}
SIZES = [(2112, 1536), (300, 384), (128, 128), (1, 256), (129, 2304)]  # N, K


def weight_of(n: int, k: int) -> torch.Tensor:
    """[N, K] with blocks of very different magnitude, and one of zeros."""
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(n + k))
    w *= torch.logspace(-4, 4, n).unsqueeze(1) * torch.logspace(2, -2, k)
    w[:128, :128] = 0
    return w


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


@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (2, 0, 3), (1, 2, 3)])
def test_leading_dimensions(shape):
    weight, scale = quantize_weight(weight_of(300, 384))
    x = activations(int(torch.tensor(shape).prod()) if shape else 1, 384)
    layer = BlockFP8Linear(weight, scale)
    assert layer(x.view(*shape, 384)).shape == (*shape, 300)
    assert_bitwise([layer(x.view(*shape, 384)).view(-1, 300)], [layer(x)])
    q = nq.group_quant(x.view(*shape, 384), spec=layer.spec)
    assert_bitwise([block_fp8_linear(q, weight, scale).view(-1, 300)], [layer(x)])


class Scales(TorchDispatchMode):
    """The strides of the activation's scale in every call of the op."""

    def __init__(self) -> None:
        super().__init__()
        self.strides = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.normquant.block_fp8_linear.default:
            self.strides.append(args[1].stride())
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("m", [1, 2, 5])
def test_scales_reach_the_op_as_they_were_made(m):
    # also for one row, whose stride torch is free to change: with another one the GPU's GEMM needs a copy
    layer = BlockFP8Linear(*quantize_weight(weight_of(300, 384)))
    with Scales() as seen:
        layer(activations(m, 384))
        layer(nq.group_quant(activations(m, 384), spec=layer.spec))
    assert seen.strides == [layer.spec.scale_stride(m, 384)] * 2


def test_nan_and_inf_reach_the_output():
    x = awkward(8, 384)
    out = BlockFP8Linear(*quantize_weight(weight_of(300, 384)))(x)
    bad = torch.tensor([4, 5])  # the rows with inf and NaN
    assert out[bad].isnan().all()
    assert not out[[0, 1, 2, 3, 7]].isnan().any()


def linear(bias: bool, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(384, 300, bias=bias, dtype=dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_from_linear_is_close_to_the_linear_layer(bias, dtype):
    stock = linear(bias, dtype)
    layer = BlockFP8Linear.from_linear(stock)
    x = activations(17, 384, dtype)
    out = layer(x)
    assert out.dtype == dtype and out.shape == (17, 300)
    # every factor is off by at most 1/16 of itself, half a step of three mantissa bits, or half the least step:
    # 2**-10 times its scale amax / 448
    xs, ws = x.float(), stock.weight.detach().float()
    x_off = xs.abs() / 16 + xs.abs().amax() / 448 * 2.0**-10
    w_off = ws.abs() / 16 + ws.abs().amax() / 448 * 2.0**-10
    bound = xs.abs() @ w_off.t() + x_off @ ws.abs().t() + x_off @ w_off.t()
    exact = torch.nn.functional.linear(xs, ws, stock.bias.detach().float() if bias else None)
    error = (out.float() - exact).abs()
    assert (error <= bound * 1.01 + 2.0**-7 * (exact.abs() + 1)).all()
    assert error.mean() < 0.05 * exact.abs().mean()
    assert not out.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bias_is_added_to_the_rounded_product(dtype):
    layer = BlockFP8Linear.from_linear(linear(True, dtype))
    x = activations(5, 384, dtype)
    without = BlockFP8Linear(layer.weight, layer.weight_scale)
    assert_bitwise([layer(x)], [without(x) + layer.bias])


def test_bias_does_not_change_the_dtype():
    q = nq.group_quant(activations(5, 384))
    out = block_fp8_linear(q, *quantize_weight(weight_of(300, 384)), torch.ones(300, dtype=torch.float32))
    assert out.dtype == torch.bfloat16


def test_a_quantized_activation_is_not_quantized_again():
    layer = BlockFP8Linear.from_linear(linear(False))
    x = activations(5, 384)
    for spec in SPECS.values():
        q = nq.group_quant(x, spec=spec)
        assert_bitwise([layer(q)], [block_fp8_linear(q, layer.weight, layer.weight_scale)])
    assert_bitwise([layer(nq.group_quant(x, spec=layer.spec))], [layer(x)])


@pytest.mark.parametrize("k", [128, 384, 512, 2304])
def test_padded_scale_is_the_scale(k):
    _, scale = quantize_weight(weight_of(300, k))
    padded = pad_weight_scale(scale)
    assert torch.equal(padded, scale) and padded.shape == scale.shape
    assert padded.stride(1) == 1 and padded.stride(0) % 4 == 0
    whole = padded.as_strided((scale.shape[0], padded.stride(0)), padded.stride())
    assert not whole[:, scale.shape[1] :].any()


def test_state_dict_round_trip():
    layer, other = BlockFP8Linear.from_linear(linear(True)), BlockFP8Linear.from_linear(linear(True))
    with torch.no_grad():
        for t in other.state_dict().values():
            t.zero_()
    x = activations(5, 384)
    assert not torch.equal(other(x), layer(x))
    assert set(layer.state_dict()) == {"weight", "weight_scale", "bias"}
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    assert other.load_state_dict(torch.load(file, weights_only=True)).missing_keys == []
    assert_bitwise([other(x)], [layer(x)])
    # still as cuBLASLt reads it
    assert other.weight_scale.stride() == (4, 1)
    assert other.state_dict()["weight_scale"].shape == (3, 3)


def test_a_copied_or_moved_layer_keeps_its_padding():
    layer = BlockFP8Linear.from_linear(linear(True))
    for other in (copy.deepcopy(layer), copy.deepcopy(layer).to("meta")):
        assert other.weight_scale.stride() == (4, 1)


def test_a_plain_tensor_as_bias_is_part_of_the_module():
    layer = BlockFP8Linear(*quantize_weight(weight_of(300, 384)), torch.ones(300, dtype=torch.bfloat16))
    assert "bias" in layer.state_dict()
    assert layer.to("meta").bias.is_meta


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


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_is_eager(backend):
    torch._dynamo.reset()
    layer = BlockFP8Linear.from_linear(linear(True)).requires_grad_(False)
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
    for m in (5, 2, 17):
        assert torch.equal(bits(compiled(activations(m, 384))), bits(layer(activations(m, 384))))


def test_the_op_is_the_dequantized_product():
    assert_bitwise([OP(*FLAT, W, S, torch.bfloat16)], [dequantized_linear(*FLAT, W, S, torch.bfloat16)])
