"""The quantization kernel, interpreted on CPU, against the reference: equal to the bit."""

import pytest
import torch
import triton
import triton.language as tl
from shared import interpreter
from shared.compare import assert_bitwise, pad_rows
from shared.inputs import activations, awkward

from normquant import QuantSpec, reference, specs
from normquant.kernels._device import fp8_max_over
from normquant.kernels.configs import Config


def check(x, spec, split=1, rows=1):
    got = interpreter.run("group_quant", x, spec, Config(4, split, rows))
    assert_bitwise(got, reference.group_quant(x, spec))
    if spec.layout == "col_tma":
        assert not pad_rows(got[1], spec.scale_rows(len(x))).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [128, 512, 1536, 2304, 7168])
def test_every_size(k, dtype):
    for m in (0, 1, 9):
        check(awkward(m, k, dtype, strided=k == 1536), QuantSpec(layout="col_tma"), split=2 if k == 7168 else 1)


@pytest.mark.parametrize("scale", ["fp32", "ue8m0_packed"])
@pytest.mark.parametrize("rows", [2, 8])
@pytest.mark.parametrize("k", [512, 1152])  # as many groups as a power of two, and not
def test_several_rows_for_a_program(k, rows, scale):
    for m in (1, 2, 9, 16):
        check(awkward(m, k), QuantSpec(scale=scale, layout="col_tma"), rows=rows)


@pytest.mark.parametrize("name", [name for name in vars(specs) if name.isupper()])
def test_every_named_spec(name):
    check(awkward(9, 1536), getattr(specs, name))


@pytest.mark.parametrize("m", [1, 31, 32, 40])
def test_another_rule_for_few_rows(m):
    spec = specs.VLLM_UE8M0.replace(layout="col_tma", few_rows=32)
    check(awkward(m, 512), spec)
    assert_bitwise(reference.group_quant(awkward(m, 512), spec), reference.group_quant(awkward(m, 512), spec.at(m)))


@pytest.mark.parametrize("nan", ["propagate", "ignore"])
@pytest.mark.parametrize("scale", ["fp32", "ue8m0", "ue8m0_packed"])
def test_groups_with_nan_and_inf(scale, nan):
    x = activations(5, 1024)
    x[0, 3], x[0, 130], x[0, 260], x[0, 262] = float("nan"), float("inf"), float("nan"), -float("inf")
    x[1], x[2, 128:256], x[3] = float("nan"), float("nan"), -float("inf")
    check(x, QuantSpec(scale=scale, layout="col_tma", nan=nan))
    check(x, QuantSpec(scale=scale, layout="col_tma", nan=nan, floor=0.0, scale_floor=1e-6))
    assert scale == "fp32" or not interpreter.run("group_quant", x, QuantSpec(scale="ue8m0", nan=nan))[1].isnan().any()


@triton.jit
def quotient_kernel(amax_ptr, out_ptr, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out_ptr + i, fp8_max_over(tl.load(amax_ptr + i), False))


def quotients(amax: torch.Tensor) -> torch.Tensor:
    out, block = torch.empty_like(amax), 1 << 18
    quotient_kernel[(len(amax) // block,)](amax, out, block)
    return out


@pytest.mark.parametrize("exponent", [-14, 0, 127])
def test_the_quotient_of_every_fp32_mantissa(exponent):
    amax = torch.arange(1 << 23, 1 << 24, dtype=torch.int32).float() * 2.0 ** (exponent - 23)
    assert_bitwise([interpreter.call(quotients, amax)], [torch.full_like(amax, 448.0) / amax])


@pytest.mark.parametrize("scale", ["fp32", "ue8m0", "ue8m0_packed"])
@pytest.mark.parametrize("group", [128, 64, 32])
def test_every_format(group, scale):
    check(awkward(9, 2304), QuantSpec(group=group, scale=scale, layout="col_tma"), split=3)


@pytest.mark.parametrize("divide", ["scale", "reciprocal", "amax", "fast_amax", "factor", "fast_factor"])
@pytest.mark.parametrize("scale_by", ["scalar", "divide", "multiply"])
def test_every_pair_of_mantissas(divide, scale_by):
    # Every bf16 mantissa, at 16 magnitudes, beside every mantissa as the amax of its group: all ties of the division.
    values = torch.arange(128.0, 256.0)  # [128] mantissas
    magnitudes = 2.0 ** -torch.arange(1.0, 17.0)
    below = (values * magnitudes.unsqueeze(1)).unsqueeze(0).expand(128, 16, 128)  # [amax, magnitude, value]
    amax = values.view(128, 1, 1).expand(128, 16, 128)
    x = torch.stack((below, amax), -1).flatten(1).bfloat16()  # [amax, 4096], the amax in every second place
    check(x, QuantSpec(divide=divide, scale_by=scale_by, floor=0.0 if divide == "fast_factor" else 1e-10))
