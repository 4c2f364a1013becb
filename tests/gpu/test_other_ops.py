"""The ops but the norms on a GPU, against the reference there."""

import itertools

import pytest
import torch
import triton
import triton.language as tl
from shared.compare import assert_bitwise
from shared.inputs import activations, awkward, weights

import normquant as nq
from normquant import QuantSpec, reference, specs
from normquant.approximate_reciprocal import approximate_reciprocal
from normquant.kernels._device import fp8_max_over, reciprocal_approximate
from normquant.kernels.configs import Config
from normquant.kernels.gated_norm_quant import gated_norm_quant
from normquant.kernels.latent_norm_quant import latent_norm_quant
from normquant.kernels.rope_last import rope_last
from normquant.kernels.silu_mul_quant import silu_mul_quant
from normquant.vllm import expert_products

Q, C, R = 1536, 512, 64  # DeepSeek-R1
SPECS = {
    "row": QuantSpec(),
    "twice": QuantSpec(layout="col", rounding="twice"),
    "deepgemm": specs.DEEPGEMM,
    "packed": specs.DEEPGEMM_PACKED,
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_group_quant(spec):
    for m in (0, 1, 9, 257):
        x = awkward(m, 2304).cuda()
        q = nq.group_quant(x, spec=spec)
        assert_bitwise((q.data, q.scale), reference.group_quant(x, spec))


def every_pair(dtype: torch.dtype) -> torch.Tensor:
    """Groups in which every mantissa of dtype meets every mantissa of an amax: each tie of a division."""
    count = {torch.bfloat16: 128, torch.float16: 1024}[dtype]
    mantissas = torch.arange(count, 2 * count, dtype=torch.float32) / count  # [1, 2)
    values = torch.cat([mantissas, mantissas[: -count % 127]]).view(-1, 127) / 2  # 127 in a group, below the amax
    amax = mantissas.view(-1, 1, 1).expand(-1, len(values), 1)
    groups = torch.cat([values.expand(count, -1, -1), amax], dim=2)  # [amax, groups, 128]
    return groups.flatten(1).to(dtype).cuda()


EACH_ARITHMETIC = ["HF", "VLLM", "VLLM_UE8M0", "AITER", "FLASHINFER", "SGLANG", "TILE_KERNELS"]


@pytest.mark.parametrize("name", EACH_ARITHMETIC)
def test_group_quant_of_every_pair_of_mantissas(name):
    # The kernel divides in its own way, with the hardware's approximate reciprocal; it must come out as IEEE division.
    spec = getattr(specs, name)
    for dtype, exponents in ((torch.bfloat16, (-60, -20, -1, 0, 9, 100)), (torch.float16, (-6, 0, 9))):
        for exponent in exponents:
            x = every_pair(dtype) * 2.0**exponent
            q = nq.group_quant(x, spec=spec)
            assert_bitwise((q.data, q.scale), reference.group_quant(x, spec))


def test_group_quant_of_every_value():
    # every finite positive bf16 value as an amax and beside others: overflow of the scale, the floor, denormals
    every = torch.arange(0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = torch.cat([every.view(-1, 64), every.flip(0).view(-1, 64)], 1).cuda()
    for spec in (QuantSpec(), specs.FLASHINFER, specs.AITER, specs.DEEPGEMM_UE8M0, specs.TILE_KERNELS):
        q = nq.group_quant(x, spec=spec)
        assert_bitwise((q.data, q.scale), reference.group_quant(x, spec))


@pytest.mark.parametrize("nan", ["propagate", "ignore"])
@pytest.mark.parametrize("scale", ["fp32", "ue8m0", "ue8m0_packed"])
def test_group_quant_of_nan_and_inf(scale, nan):
    x = activations(5, 1024)
    x[0, 3], x[0, 130], x[0, 260], x[0, 262] = float("nan"), float("inf"), float("nan"), -float("inf")
    x[1], x[2, 128:256], x[3] = float("nan"), float("nan"), -float("inf")
    for floors in ({}, {"floor": 0.0, "scale_floor": 1e-6}):
        spec = QuantSpec(scale=scale, layout="col_tma", nan=nan, **floors)
        q = nq.group_quant(x.cuda(), spec=spec)
        assert_bitwise((q.data, q.scale), reference.group_quant(x.cuda(), spec))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_silu_mul_quant(spec):
    for m in (0, 1, 9, 257):
        x = awkward(m, 2 * 2304).cuda()
        assert_bitwise(silu_mul_quant(x, spec, Config(4), return_product=True), reference.silu_mul_quant(x, spec))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_silu_mul_quant_with_a_limit(dtype):
    x = awkward(9, 2 * 2304, dtype).cuda() * 4
    for spec, limit in itertools.product((QuantSpec(), QuantSpec(rounding="twice")), (0.01, 7.3, 10.0)):
        made = silu_mul_quant(x, spec, Config(4), limit, return_product=True)
        assert_bitwise(made, reference.silu_mul_quant(x, spec, limit))


@pytest.mark.parametrize("config", [Config(8, 2), Config(16)], ids=str)
def test_silu_mul_quant_of_every_gate(config):
    every = torch.arange(0x10000, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    gate = every[every.isfinite()][: 65280 // 2048 * 2048].view(-1, 2048).cuda()
    x = torch.cat([gate, activations(len(gate), 2048).cuda()], 1)
    for spec in (QuantSpec(), QuantSpec(rounding="twice")):
        assert_bitwise(silu_mul_quant(x, spec, config, return_product=True), reference.silu_mul_quant(x, spec))


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_gated_norm_quant(spec, d):
    for m in (0, 1, 9, 257):
        x, z, w = awkward(m, 2048).cuda(), awkward(m, 2048, seed=1).cuda(), weights(d).cuda()
        for config in (Config(4), Config(8, 4)):
            got = gated_norm_quant(x, z, w, 1e-6, spec, config)
            assert_bitwise(got, reference.gated_norm_quant(x, z, w, 1e-6, spec))


def angles(rows: int, dtype: torch.dtype) -> torch.Tensor:
    angle = torch.outer(torch.arange(rows), 10000.0 ** (-torch.arange(R // 2) / (R // 2)))
    return torch.cat((angle.cos(), angle.sin()), 1).to(dtype).cuda()


@pytest.mark.parametrize(
    ("rope", "quantize_kv", "spec"),
    [
        ("interleaved", True, SPECS["twice"]),
        ("half", False, SPECS["twice"]),
        ("interleaved_to_half", False, SPECS["deepgemm"]),
        ("half", True, SPECS["row"]),
    ],
)
def test_latent_norm_quant(rope, quantize_kv, spec):
    cos, sin = angles(512, torch.bfloat16).split(R // 2, dim=1)
    for m in (0, 1, 9, 257):
        x, positions = awkward(m, Q + C + R).cuda(), torch.arange(m, device="cuda").flip(0)
        args = (x, weights(Q).cuda(), weights(C, seed=1).cuda(), cos, sin, positions, 1e-6, rope, spec)
        expected = reference.latent_norm_quant(*args)
        got = latent_norm_quant(*args, quantize_kv, Config(8))
        assert_bitwise(got, expected if quantize_kv else (*expected[:4], None, None))


@pytest.mark.parametrize("config", [Config(4, 2), Config(8, 4), Config(16)], ids=str)
def test_latent_norm_quant_in_every_config(config):
    cos, sin = angles(512, torch.float32).split(R // 2, dim=1)
    x, spec = activations(257, Q + C + R).cuda(), SPECS["packed"]
    args = (x, weights(Q).cuda(), weights(C, seed=1).cuda(), cos, sin, None, 1e-6, "interleaved", spec)
    assert_bitwise(latent_norm_quant(*args, True, config), reference.latent_norm_quant(*args))


@pytest.mark.parametrize("rope", ["interleaved", "half", "interleaved_to_half"])
@pytest.mark.parametrize(("heads", "d"), [(16, 192), (128, 192), (3, 64), (5, 88)])
def test_rope_last(heads, d, rope):
    for dtype, rounding in ((torch.bfloat16, "twice"), (torch.float16, "once")):
        cache = angles(512, dtype)
        for m in (0, 1, 9, 257):
            wide = awkward(m, heads * d + 64, dtype).cuda()
            positions = torch.arange(m, device="cuda").flip(0)
            for x, at in ((wide[:, : heads * d], positions), (wide[:, 3 : heads * d + 3], positions.int())):
                args = (x, cache, cache[:, R // 2 :], at, heads, R, rope, QuantSpec(rounding=rounding))
                assert_bitwise((rope_last(*args),), (reference.rope_last(*args),))


@triton.jit
def rcp_kernel(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, reciprocal_approximate(tl.load(x_ptr + i)))


@pytest.mark.parametrize("exponent", [-100, -14, 0, 15, 100])
def test_the_approximate_reciprocal_of_every_mantissa(exponent):
    x = (torch.arange(1024, 2048) * 2.0 ** (exponent - 10)).float().cuda()
    out = torch.empty_like(x)
    rcp_kernel[(1,)](x, out, 1024)
    assert_bitwise((approximate_reciprocal(x),), (out,))


@triton.jit
def quotient_kernel(amax_ptr, out_ptr, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out_ptr + i, fp8_max_over(tl.load(amax_ptr + i), True))


@pytest.mark.parametrize("exponent", [-50, -14, 0, 127])
def test_the_quotient_of_every_fp32_mantissa(exponent):
    amax = torch.arange(1 << 23, 1 << 24, dtype=torch.int32).float() * 2.0 ** (exponent - 23)
    out = torch.empty_like(amax, device="cuda")
    quotient_kernel[(len(amax) // 1024,)](amax.cuda(), out, 1024, enable_fp_fusion=False)
    assert_bitwise((out.cpu(),), (torch.full_like(amax, 448.0) / amax,))


@pytest.mark.parametrize("m", [1, 33, 4096])
def test_a_gated_product_of_experts_is_written_where_it_is_told(m):
    spec = specs.VLLM_UE8M0.replace(rounding="twice")
    x, output = activations(m, 512).cuda(), torch.zeros(m, 256, dtype=torch.bfloat16, device="cuda")
    for _ in range(2):  # the second call does not ask Triton
        given = expert_products._write(x, output.zero_(), spec.encode())
        assert_bitwise((*given, output), reference.silu_mul_quant(x, spec))
