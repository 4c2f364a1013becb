"""The reference against float64 with derived bounds, and to the bit against other people's norms."""

import math
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from shared.compare import assert_bitwise, bits
from shared.inputs import activations, awkward, exact, weights

from normquant import QuantSpec, reference

EPS = 1e-6
U = 2.0**-24  # unit roundoff of fp32: one rounding is off by at most this part
ROUNDINGS = ("none", "inner", "once", "twice")
DTYPES = (torch.bfloat16, torch.float16)
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # the same of the activation dtypes
KS = (128, 512, 1536, 2304, 7168, 8192)
CLOSE = 1 + 2.0**-10  # for the products of roundings that a sum of them leaves out


def norm64(h: torch.Tensor, w: torch.Tensor, eps: float = EPS, offset: float = 0.0) -> torch.Tensor:
    h = h.double()
    return h / (h.square().mean(-1, keepdim=True) + eps).sqrt() * (w.double() + offset)


def half_step(q: torch.Tensor) -> torch.Tensor:
    """Half the distance between neighbours of float8_e4m3fn around |q|: three mantissa bits, least exponent -6."""
    return torch.exp2(q.abs().clamp(2.0**-6, 448).log2().floor() - 4)


@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_is_within_its_roundings_of_float64(k, rounding, dtype):
    h, w = activations(16, k, torch.float32, seed=k) * 3, weights(k, dtype)
    y = reference.rms_norm(h, w, EPS, QuantSpec(rounding=rounding), dtype).double()
    # The squares, log2(K) levels of the tree, the mean and + eps, all halved by the square root; then the root, its
    # reciprocal and the two products.
    fp32 = ((k - 1).bit_length() + 3) / 2 + 4
    storage = {"none": 0, "inner": 1, "once": 1, "twice": 2}[rounding]
    bound = (fp32 * U + storage * UNIT[dtype]) * CLOSE
    expected = norm64(h, w)
    # below the normal numbers the steps of dtype are absolute
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps if storage else 0.0
    assert ((y - expected).abs() <= bound * expected.abs() + smallest * w.double().abs().clamp(min=1)).all()
    assert (y != expected).any()


@pytest.mark.parametrize("divide", ["scale", "reciprocal", "amax", "fast_amax", "factor"])
@pytest.mark.parametrize("scale_by", ["scalar", "divide", "multiply"])
@pytest.mark.parametrize("group", [128, 64, 32])
def test_data_is_the_nearest_fp8_value(group, scale_by, divide):
    spec = QuantSpec(group=group, scale_by=scale_by, divide=divide)
    y = activations(64, 2304, torch.float32) * torch.logspace(-6, 6, 64).unsqueeze(1)
    data, scale = reference.quantize(y, spec)
    wide = scale.double().repeat_interleave(group, 1)
    q = y.double() / wide
    # at most three fp32 roundings stand between y/s and the value that is rounded to fp8
    assert ((data.double() - q).abs() <= half_step(q) + 3 * U * q.abs() * CLOSE).all()
    amax = y.double().unflatten(1, (-1, group)).abs().amax(-1)
    assert ((scale.double() * 448 / amax - 1).abs() <= 2 * U * CLOSE).all()
    assert (data.double().abs().unflatten(1, (-1, group)).amax(-1) == 448).all()  # the full range is used


@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("scale", ["fp32", "ue8m0"])
def test_dequantized_norm_is_half_a_step_from_the_norm(k, scale):
    x, w = activations(16, k), weights(k)
    spec = QuantSpec(scale=scale)
    data, s, y = reference.rms_norm_quant(x, w, EPS, spec)
    wide = s.double().repeat_interleave(128, 1)
    bound = half_step(y.double() / wide) * wide + 3 * U * y.double().abs() * CLOSE
    assert ((data.double() * wide - y.double()).abs() <= bound).all()
    steps = s / (y.float().unflatten(1, (-1, 128)).abs().amax(-1) / 448)
    assert (steps >= 1 - 2 * U).all() and (steps < (2 if scale == "ue8m0" else 1 + 2 * U)).all()


def recursive_sum(values: np.ndarray) -> np.float32:
    """The sum of a row whose length is a power of two: that of its first half plus that of its second."""
    if len(values) == 1:
        return values[0]
    half = len(values) // 2
    return np.float32(recursive_sum(values[:half]) + recursive_sum(values[half:]))


@pytest.mark.parametrize("k", [1, 2, 3, 32, 96, 128, 384, 1000, 1536, 7168])
def test_the_order_of_the_sum_is_a_binary_tree(k):
    h = activations(3, k, torch.float32) * 100
    padded = np.zeros((3, 1 << (k - 1).bit_length()), dtype=np.float32)
    padded[:, :k] = (h * h).numpy()
    expected = torch.tensor(np.array([[recursive_sum(row)] for row in padded]))
    assert_bitwise([reference.sum_of_squares(h)], [expected])


def test_the_order_matters():
    # otherwise the test above would pass with any sum
    h = activations(64, 7168, torch.float32)
    assert (reference.sum_of_squares(h) != h.square().sum(-1, keepdim=True)).any()


@pytest.mark.parametrize("k", [128, 1536, 2304, 7168])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_eager_graph_to_the_bit_where_the_sum_is_exact(k, rounding, dtype, offset):
    x, w = exact(16, k, dtype), weights(k, dtype)
    h = x.to(torch.float32)
    n = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    if rounding in ("inner", "twice"):
        n = n.to(dtype)
    y = n.float() * (w.float() + offset)
    if rounding in ("once", "twice"):
        y = y.to(dtype)
    groups = y.float().view(16, -1, 128)
    scale = groups.abs().amax(-1).clamp(min=1e-10) / 448.0
    data = (groups / scale.unsqueeze(-1)).clamp(-448.0, 448.0).to(torch.float8_e4m3fn).view(16, k)
    got = reference.rms_norm_quant(x, w, EPS, QuantSpec(rounding=rounding), offset)
    assert_bitwise(got, (data, scale, y.to(dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_once_is_torchs_own_rms_norm(dtype):
    x, w = exact(16, 1536, dtype), weights(1536, dtype)
    *_, y = reference.rms_norm_quant(x, w, EPS, QuantSpec(rounding="once"))
    assert_bitwise([y], [F.rms_norm(x, (1536,), w, EPS)])


def hugging_face(family: str, name: str, w: torch.Tensor) -> torch.nn.Module:
    module = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    norm = getattr(module, name)(w.shape[0], eps=EPS)
    norm.weight = torch.nn.Parameter(w, requires_grad=False)
    return norm


@pytest.mark.parametrize(("family", "name"), [("deepseek_v3", "DeepseekV3RMSNorm"), ("llama", "LlamaRMSNorm")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_twice_is_the_norm_of_transformers(family, name, dtype):
    x, w = exact(16, 1536, dtype), weights(1536, dtype)
    *_, y = reference.rms_norm_quant(x, w, EPS, QuantSpec(rounding="twice"))
    assert_bitwise([y], [hugging_face(family, name, w)(x)])
    *_, once = reference.rms_norm_quant(x, w, EPS, QuantSpec(rounding="once"))
    assert (once != y).any()


def test_inner_is_the_norm_of_transformers_with_fp32_weights():
    # bf16 activations times fp32 weights are fp32 in torch: the second rounding does not happen
    x, w = exact(16, 1536), weights(1536, torch.float32)
    y = reference.rms_norm(x.float(), w, EPS, QuantSpec(rounding="inner"), torch.bfloat16)
    theirs = hugging_face("deepseek_v3", "DeepseekV3RMSNorm", w)(x)
    assert theirs.dtype == torch.float32
    assert_bitwise([y], [theirs])


@pytest.mark.parametrize(("family", "name"), [("gemma", "GemmaRMSNorm"), ("gemma3", "Gemma3RMSNorm")])
def test_once_with_an_offset_is_gemmas_norm(family, name):
    x, w = exact(16, 1536), weights(1536) - 1
    *_, y = reference.rms_norm_quant(x, w, EPS, QuantSpec(rounding="once"), 1.0)
    assert_bitwise([y], [hugging_face(family, name, w)(x)])


def wide_sums(m: int = 16, k: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """x and residual whose sums need more than eight bits, while the squares of the sums still add up exactly."""
    x = exact(m, k)
    residual = torch.randint(-40, 41, (m, k), generator=torch.Generator().manual_seed(1)).bfloat16()
    h = x.float() + residual.float()
    assert (h.square().sum(-1) * 64 < 2**24).all() and (h.bfloat16().float() != h).any()
    return x, residual


@pytest.mark.parametrize("sum_", ["fp32", "rounded"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_residual_add(sum_, rounding):
    x, residual = wide_sums()
    w, spec = weights(256), QuantSpec(sum=sum_, rounding=rounding)
    data, scale, stored, norm = reference.add_rms_norm_quant(x, residual, w, EPS, spec)
    assert_bitwise([stored], [x + residual])
    h = (x + residual).float() if sum_ == "rounded" else x.float() + residual.float()
    y = reference.rms_norm(h, w, EPS, spec, torch.bfloat16)
    assert_bitwise((data, scale, norm), (*reference.group_quant(y, spec), y.bfloat16()))


def test_rounded_sum_is_transformers_decoder_layer():
    x, residual = wide_sums()
    w = weights(256)
    theirs = hugging_face("deepseek_v3", "DeepseekV3RMSNorm", w)(residual + x)
    ours = {s: reference.add_rms_norm_quant(x, residual, w, EPS, QuantSpec(rounding="twice", sum=s))[3]
            for s in ("fp32", "rounded")}  # fmt: skip
    assert_bitwise([ours["rounded"]], [theirs])
    assert (ours["fp32"] != theirs).any()


@pytest.mark.parametrize(("layout", "rounding"), list(product(("row", "col_tma"), ROUNDINGS)))
def test_a_row_does_not_know_its_neighbours(layout, rounding):
    x, residual, w = awkward(17, 1536), activations(17, 1536, seed=2), weights(1536)
    spec = QuantSpec(layout=layout, rounding=rounding)
    run = lambda rows: reference.add_rms_norm_quant(x[rows], residual[rows], w, EPS, spec)  # noqa: E731
    together = run(slice(None))
    order = torch.randperm(17, generator=torch.Generator().manual_seed(0))
    for rows in ([i] for i in range(17)), [order.tolist()], [[3, 3, 3]]:
        for chosen in rows:
            for alone, all_ in zip(run(chosen), together, strict=True):
                assert torch.equal(bits(alone), bits(all_[chosen]))


def test_strides_do_not_matter():
    wide = awkward(9, 2 * 1536 + 3)
    x, residual, w = wide[:, 1:1537], wide[:, 1538:3074], weights(1536)
    spec = QuantSpec()
    assert_bitwise(
        reference.add_rms_norm_quant(x, residual, w, EPS, spec),
        reference.add_rms_norm_quant(x.contiguous(), residual.contiguous(), w, EPS, spec),
    )


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_silu_mul_against_float64(rounding):
    x = activations(64, 512) * 4
    gate, up = x.double().chunk(2, 1)
    expected = gate / (1 + (-gate).exp()) * up
    spec = QuantSpec(rounding=rounding)
    data, scale, product = reference.silu_mul_quant(x, spec)
    wide = scale.double().repeat_interleave(128, 1)
    # exp (one ulp, two units), the sum, the division, the product: five; then the roundings to bf16, then to fp8
    part = 5 * U + {"none": 0, "inner": 1, "once": 1, "twice": 2}[rounding] * UNIT[torch.bfloat16]
    error = (data.double() * wide - expected).abs()
    # a second `part` for values that it moves past a power of two, where the step doubles
    bound = half_step(expected / wide) * wide + (2 * part + 3 * U) * expected.abs()
    assert (error <= bound * CLOSE).all()
    error = (product.double() - expected).abs()
    assert (error <= (part + UNIT[torch.bfloat16]) * expected.abs() * CLOSE).all()


def test_silu_mul_with_a_limit_by_hand():
    x = torch.tensor([9.0, -9.0, 1.0, 9.0, -9.0, 1.0]).bfloat16().repeat_interleave(128).view(1, -1)  # gate, then up
    data, scale, _ = reference.silu_mul_quant(x, QuantSpec(rounding="none"), 2.0)
    silu = lambda g: g / (1 + math.exp(-g))  # noqa: E731
    products = silu(2.0) * 2.0, silu(-9.0) * -2.0, silu(1.0) * 1.0  # no lower limit for the gate
    assert scale[0].tolist() == pytest.approx([abs(y) / 448 for y in products], rel=1e-6)
    assert data.float()[0, ::128].tolist() == [448.0, 448.0, 448.0]


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_gated_norm_against_float64(rounding, d):
    x, z, w = activations(64, 512), activations(64, 512, seed=1) * 4, weights(d)
    gate = z.double()
    expected = norm64(x.view(64, -1, d), w).flatten(1) * gate / (1 + (-gate).exp())
    data, scale = reference.gated_norm_quant(x, z, w, EPS, QuantSpec(rounding=rounding))
    wide = scale.double().repeat_interleave(128, 1)
    # those of the norm and of silu times something, as above; and the product's own rounding to bf16
    fp32 = ((d - 1).bit_length() + 3) / 2 + 4 + 5
    part = fp32 * U + (1 + {"none": 0, "inner": 1, "once": 1, "twice": 2}[rounding]) * UNIT[torch.bfloat16]
    error = (data.double() * wide - expected).abs()
    bound = half_step(expected / wide) * wide + (2 * part + 3 * U) * expected.abs()
    assert (error <= bound * CLOSE).all()


@pytest.mark.parametrize("rope", ["interleaved", "half", "interleaved_to_half"])
def test_rope_is_a_turn_of_complex_numbers(rope):
    x = activations(7, 64)
    angle = torch.outer(torch.arange(7.0), 10000.0 ** (-torch.arange(32) / 32))
    first, second = (x[:, :32], x[:, 32:]) if rope == "half" else (x[:, ::2], x[:, 1::2])
    z = torch.complex(first.double(), second.double()) * torch.polar(torch.ones(7, 32).double(), angle.double())
    got = reference.rotate(x, angle.cos(), angle.sin(), rope, QuantSpec()).double()
    first, second = (got[:, ::2], got[:, 1::2]) if rope == "interleaved" else (got[:, :32], got[:, 32:])
    # cos and sin in fp32 (one ulp), products and sum in fp32, each of which is at most |z|; then one rounding to bf16
    for part, expected in ((first, z.real), (second, z.imag)):
        assert ((part - expected).abs() <= UNIT[torch.bfloat16] * CLOSE * expected.abs() + 8 * U * z.abs()).all()


def test_latents_are_the_three_parts():
    x, w, v = activations(6, 384 + 256 + 64), weights(384), weights(256, seed=1)
    angle = torch.outer(torch.arange(9.0), 10000.0 ** (-torch.arange(32) / 32))
    cos, sin, positions = angle.cos(), angle.sin(), torch.tensor([8, 0, 3, 3, 1, 2])
    spec = QuantSpec(layout="col_tma")
    q_data, q_scale, kv, k_pe, kv_data, kv_scale = reference.latent_norm_quant(
        x, w, v, cos, sin, positions, EPS, "half", spec
    )
    assert_bitwise((q_data, q_scale), reference.rms_norm_quant(x[:, :384], w, EPS, spec)[:2])
    assert_bitwise((kv_data, kv_scale, kv), reference.rms_norm_quant(x[:, 384:640], v, EPS, spec))
    assert_bitwise([k_pe], [reference.rotate(x[:, 640:], cos[positions], sin[positions], "half", spec)])
