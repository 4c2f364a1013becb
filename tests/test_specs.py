"""Each named spec against the rule of the library it is named after, written out here a second time."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import pytest
import torch
from shared.compare import assert_bitwise
from shared.inputs import exact

from normquant import QuantizedActivation, QuantSpec, reference, specs

EPS = 1e-6
M, K, GROUP = 9, 1024, 128


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, residual and weight: squares that add up exactly, sums that bf16 rounds, and groups around every floor."""
    x = exact(M, K)
    residual = (torch.randint(0, 2, (M, K), generator=torch.Generator().manual_seed(0)) * 33).bfloat16()
    residual[:, torch.arange(K) % 4 != 3] = 0  # a total of squares below 2**24 / 64 is exact in any order
    x[0], residual[0] = 0, 0
    weight = 1 + torch.rand(K, generator=torch.Generator().manual_seed(1))
    weight *= torch.tensor([1, -1, 1e-3, 3e-5, 1e-6, 1e-9, 1e-11, 0.0]).repeat_interleave(GROUP)
    h = x.float() + residual.float()
    assert (h.square().sum(-1) * 64 < 2**24).all() and (h.bfloat16().float() != h).any()
    return x, residual, weight.bfloat16()


def normed(h: torch.Tensor) -> torch.Tensor:
    return h * torch.rsqrt(h.square().sum(-1, keepdim=True) / K + EPS)  # fp32


def bf16(t: torch.Tensor) -> torch.Tensor:
    return t.bfloat16().float()


NORMS = {
    "y = round(x * rstd * w)": lambda h, w: bf16(normed(h) * w),
    "y = round(round(x * rstd) * w)": lambda h, w: bf16(bf16(normed(h)) * w),
    "y = x * rstd * w": lambda h, w: normed(h) * w,
}
SUMS = {
    "the sum as fp32": lambda x, r: x.float() + r.float(),
    "the sum as stored": lambda x, r: (x + r).float(),
    "no residual": lambda x, r: x.float(),
}
FP32_448 = torch.tensor(448.0)


def at_least(floor: float) -> Callable:
    return lambda t: torch.maximum(t, torch.tensor(floor))


def power_of_two(s: torch.Tensor) -> torch.Tensor:
    return torch.exp2(s.double().log2().ceil()).float()


@dataclass(frozen=True)
class Rule:
    """One library's arithmetic: what it norms, the scale s of a group from its amax a, and q from y, s and a."""

    h: str
    norm: str
    s: Callable
    q: Callable
    layout: str = "row"


def amax_448(floor: float) -> Callable:
    return lambda a: at_least(floor)(a) / FP32_448


def factor(a: torch.Tensor) -> torch.Tensor:
    return torch.where(a == 0, 1.0, torch.ones(()) / a * FP32_448)


def by_scale(y, s, a):
    return y / s


def by_reciprocal(y, s, a):
    return y * (torch.ones(()) / s)


def by_factor(floor: float) -> Callable:
    return lambda y, s, a: y * (FP32_448 / at_least(floor)(a))


def by_amax(floor: float) -> Callable:
    # "448 / amax" in a library built with fast math, where a / b is a * (1 / b)
    return lambda y, s, a: y * (FP32_448 * (torch.ones(()) / at_least(floor)(a)))


ONCE, TWICE, NEVER = NORMS
RULES = {
    # transformers and DeepSeek's eager model: "two roundings; amax floor 1e-10; s = amax/448; q = y/s"
    "HF": Rule("the sum as stored", TWICE, amax_448(1e-10), by_scale),
    # "norm uses the unrounded fp32 sum; y = bf16(x*rstd*w), one rounding; amax = max(amax, 1e-4); s = amax/448;
    # q = y*(448/amax)"
    "FLASHINFER": Rule("the sum as fp32", ONCE, amax_448(1e-4), by_amax(1e-4), "col_tma"),
    # per_token_group_fp8_quant after the norm: "amax floor 1e-10; s = amax/448; q = y/s"
    "VLLM": Rule("the sum as fp32", TWICE, amax_448(1e-10), by_scale),
    # after the CUDA op fused_add_rms_norm, which adds in the activation dtype, reads what it stored and rounds once
    "VLLM_OPS": Rule("the sum as stored", ONCE, amax_448(1e-10), by_scale),
    # silu_and_mul_per_block_quant: "the same scale; the product is never rounded"
    "VLLM_FUSED_SILU": Rule("no residual", NEVER, lambda a: at_least(1.0 / (448.0 * 512.0))(a / FP32_448), by_scale),
    # with scale_ue8m0: "s = 2^ceil(log2(max(s, 1e-10)))"
    "VLLM_UE8M0": Rule("no residual", TWICE, lambda a: power_of_two(at_least(1e-10)(amax_448(1e-10)(a))), by_scale),
    # "unrounded sum; y = bf16(bf16(x*rstd)*w); s = max(amax/448, 1/(448*512)); q = y/s"
    "VLLM_FUSED": Rule("the sum as fp32", TWICE, lambda a: at_least(1.0 / (448.0 * 512.0))(a / FP32_448), by_scale),
    # "fp32 throughout, no rounding of y"
    "VLLM_PR_37960": Rule("the sum as fp32", NEVER, amax_448(1e-10), by_scale, "col"),
    # "the same, amax floor 1e-10, q = y*(1/s)"
    "AITER": Rule("the sum as fp32", NEVER, amax_448(1e-10), by_reciprocal),
    # "amax clamp 1e-4; s = amax/448; q = y*(1/s)"
    "DEEPGEMM": Rule("no residual", ONCE, amax_448(1e-4), by_reciprocal, "col_tma"),
    # "UE8M0 by bit-ceil"
    "DEEPGEMM_UE8M0": Rule("no residual", ONCE, lambda a: power_of_two(amax_448(1e-4)(a)), by_reciprocal, "col_tma"),
    # "packed: four exponents per int32"
    "DEEPGEMM_PACKED": Rule("no residual", ONCE, lambda a: power_of_two(amax_448(1e-4)(a)), by_reciprocal, "col_tma"),
    # "sf = amax / 448, amax clamped at 1e-4; sf_inv = 448 / amax; q = y * sf_inv", of a product in fp32
    "TILE_KERNELS": Rule("no residual", NEVER, amax_448(1e-4), by_factor(1e-4)),
    # "floor 1e-10, s = amax*(1/448), q = y*(448/amax)"
    "SGLANG": Rule("no residual", ONCE, lambda a: at_least(1e-10)(a) * (torch.ones(()) / FP32_448), by_amax(1e-10)),
    # "amax in bf16 without a floor (0 gives scale 1), f = 448 / amax, q = x * f, stored scale 1 / f"
    "FLASHINFER_LINEAR": Rule("no residual", TWICE, lambda a: 1 / factor(a), lambda y, s, a: y * factor(a), "col_tma"),
    # "as vLLM but s = amax*(1/448)"
    "HELION": Rule("no residual", TWICE, lambda a: at_least(1e-10)(a) * (torch.ones(()) / FP32_448), by_scale),
}


def test_every_named_spec_has_its_rule():
    assert set(RULES) == {name for name in vars(specs) if name.isupper()}
    assert all(isinstance(getattr(specs, name), QuantSpec) for name in RULES)


def ours(spec: QuantSpec, h: str) -> tuple[QuantizedActivation, torch.Tensor]:
    x, residual, weight = inputs()
    if h == "no residual":
        data, scale, norm = reference.rms_norm_quant(x, weight, EPS, spec)
    else:
        data, scale, _, norm = reference.add_rms_norm_quant(x, residual, weight, EPS, spec)
    return QuantizedActivation(data, scale, spec), norm


def quantized(rule: Rule, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    groups = y.unflatten(1, (-1, GROUP))
    a = groups.abs().amax(-1)
    s = rule.s(a)
    q = rule.q(groups, s.unsqueeze(-1), a.unsqueeze(-1)).clamp(-448, 448).to(torch.float8_e4m3fn)
    return q.flatten(1), s


def theirs(rule: Rule) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, residual, weight = inputs()
    y = NORMS[rule.norm](SUMS[rule.h](x, residual), weight.float())
    return *quantized(rule, y), y.bfloat16()


def every_mantissa() -> torch.Tensor:
    """Groups of bf16 values, each mantissa beside each as the amax, at two magnitudes: ties of every division."""
    mantissas = torch.arange(128.0, 256.0)  # [128]
    y = mantissas.repeat(128, 1) / 256  # [128, 128], a group a row
    y[:, 0] = mantissas
    return torch.cat([y, y * 2.0**-16])


@pytest.mark.parametrize("name", RULES)
def test_a_named_spec_is_its_rule(name):
    rule, spec = RULES[name], getattr(specs, name)
    q, norm = ours(spec, rule.h)
    assert spec.layout == rule.layout
    assert q.scale.stride() == spec.scale_stride(M, K)
    assert_bitwise((q.data, q.scales().contiguous(), norm), theirs(rule))


@pytest.mark.parametrize("name", RULES)
def test_a_named_spec_rounds_every_mantissa_as_its_rule(name):
    y = every_mantissa()
    assert_bitwise(reference.quantize(y, getattr(specs, name)), quantized(RULES[name], y))


def test_the_rules_differ():
    # Two rules that say different arithmetic give different bits on these inputs, so a mistaken spec is seen above.
    x, residual, _ = inputs()
    results = {
        name: (*theirs(rule), *quantized(rule, every_mantissa()), SUMS[rule.h](x, residual))
        for name, rule in RULES.items()
    }
    for a, b in combinations(results, 2):
        # one arithmetic stored in two ways; one arithmetic on CPU, where torch divides by a Python scalar truly
        if {a, b} not in ({"DEEPGEMM_UE8M0", "DEEPGEMM_PACKED"}, {"HF", "VLLM_EAGER"}):
            pairs = zip(results[a], results[b], strict=True)
            assert any(not torch.equal(s.float(), t.float()) for s, t in pairs), (a, b)


# What the scale of a group with a NaN is, and whether its data is NaN beside the NaN. vLLM's kernel: "fmaxf(absmax,
# fabsf(x))", which prefers the number; FlashInfer's: the same. DeepGEMM: "exponent.clamp(1, 254)" of NaN is 254.
WITHOUT_NAN = ("VLLM_UE8M0", "FLASHINFER_LINEAR")
OF_NAN = {"DEEPGEMM_UE8M0": 2.0**127, "DEEPGEMM_PACKED": 2.0**127}


def one_group(**values: float) -> torch.Tensor:
    """A group of ordinary values with some put in: [1, GROUP]."""
    y = torch.linspace(-3, 3, GROUP).bfloat16().float().unsqueeze(0)
    for at, value in enumerate(values.values()):
        y[0, at] = value
    return y


@pytest.mark.parametrize("name", RULES)
def test_a_nan_is_what_the_rule_makes_of_it(name):
    spec = getattr(specs, name)
    data, scale = reference.quantize(one_group(nan=float("nan")), spec)
    if name in WITHOUT_NAN:
        expected, expected_scale = reference.quantize(one_group(zero=0.0), spec)
        assert torch.equal(data[:, 1:].float(), expected[:, 1:].float()) and torch.equal(scale, expected_scale)
        assert data[0, 0].isnan()
        data, scale = reference.quantize(torch.full((1, GROUP), float("nan")), spec)
        assert torch.equal(scale, reference.quantize(torch.zeros(1, GROUP), spec)[1])
    else:
        assert_bitwise([scale], [torch.tensor([[OF_NAN.get(name, float("nan"))]])])
    assert data.float().isnan().sum() == GROUP if name not in WITHOUT_NAN else data.float().isnan().all()


@pytest.mark.parametrize("name", [name for name in RULES if getattr(specs, name).is_ue8m0])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3.38e38, 0.0, 1e-40])
def test_a_scale_that_is_a_power_of_two_has_no_mantissa(name, value):
    # transpose_and_pack_fp32_into_ue8m0 asserts "(value & 0x7fffff) == 0"
    for y in (one_group(x=value), one_group(x=value, y=float("nan")), torch.full((1, GROUP), value)):
        _, scale = reference.quantize(y, getattr(specs, name))
        assert scale.view(torch.int32).item() & 0x807FFFFF == 0 and scale > 0


def test_packed_scales_are_the_exponents_of_the_others():
    packed, _ = ours(specs.DEEPGEMM_PACKED, "no residual")
    plain, _ = ours(specs.DEEPGEMM_UE8M0, "no residual")
    assert_bitwise([packed.data], [plain.data])
    for row in range(M):
        exponents = (plain.scale[row].double().log2() + 127).to(torch.int64).tolist()
        words = [sum(e << (8 * i) for i, e in enumerate(exponents[at : at + 4])) for at in range(0, len(exponents), 4)]
        assert [w & 0xFFFFFFFF for w in packed.scale[row].tolist()] == words
