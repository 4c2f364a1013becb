"""The reference on values that are not ordinary: zeros, denormals, overflow, inf, NaN, and powers of two."""

import pytest
import torch
import torch.nn.functional as F
from shared.inputs import activations, weights

from normquant import QuantSpec, reference, specs

EPS = 1e-6
DTYPES = (torch.bfloat16, torch.float16)


def test_a_row_of_zeros():
    x, w = torch.zeros(2, 256, dtype=torch.bfloat16), weights(256)
    data, scale, y = reference.rms_norm_quant(x, w, EPS, QuantSpec())
    assert not data.float().any() and not y.any()
    assert torch.equal(scale, torch.full((2, 2), 1e-10) / 448)


def test_negative_zero_keeps_its_sign():
    x = torch.full((1, 128), -0.0, dtype=torch.bfloat16)
    for divide in ("scale", "reciprocal", "amax", "fast_amax", "factor"):
        data, _ = reference.group_quant(x, QuantSpec(divide=divide))
        assert (data.view(torch.uint8) == 0x80).all()


def test_nan_in_a_row_makes_the_row_nan():
    x, w = activations(3, 384), weights(384)
    x[1, 200] = float("nan")
    for tensor in reference.rms_norm_quant(x, w, EPS, QuantSpec()):
        assert tensor[1].float().isnan().all()
        assert not tensor[[0, 2]].float().isnan().any()


@pytest.mark.parametrize("name", ["VLLM_UE8M0", "DEEPGEMM_UE8M0"])
def test_nan_in_a_row_gives_powers_of_two(name):
    spec = getattr(specs, name)
    x, w = activations(3, 384), weights(384)
    x[1, 200] = float("nan")
    data, scale, y = reference.rms_norm_quant(x, w, EPS, spec)
    assert data[1].float().isnan().all() and y[1].isnan().all()
    assert not data[[0, 2]].float().isnan().any()
    assert (scale[1] == {"VLLM_UE8M0": 2.0**-33, "DEEPGEMM_UE8M0": 2.0**127}[name]).all()  # 2**-33 is above 1e-10


def test_a_sum_of_squares_that_overflows_counts_as_zeros():
    x, w = activations(2, 384), weights(384)
    x[0] = 3e38
    x[1, 200] = float("inf")
    data, scale, y = reference.rms_norm_quant(x, w, EPS, QuantSpec())
    floor = torch.tensor(1e-10) / 448
    assert not data[0].float().any() and not y[0].any() and (scale[0] == floor).all()
    assert scale[1, 1].isnan() and data[1, 128:256].float().isnan().all()
    assert (scale[1, [0, 2]] == floor).all()
    assert not data[1, :128].float().any() and not data[1, 256:].float().any()
    assert y[1].isnan().sum() == 1


@pytest.mark.parametrize("divide", ["scale", "reciprocal", "amax", "fast_amax", "factor"])
def test_nan_and_inf_stay_in_their_group(divide):
    x = activations(1, 512)
    clean, _ = reference.group_quant(x, QuantSpec(divide=divide))
    x[0, 130], x[0, 260], x[0, 270] = float("nan"), float("inf"), float("-inf")
    data, scale = reference.group_quant(x, QuantSpec(divide=divide))
    data = data.float()
    assert scale[0, 1].isnan() and data[0, 128:256].isnan().all()
    assert scale[0, 2] == float("inf")
    assert data[0, 256:384].isnan().nonzero().flatten().tolist() == [4, 14]
    assert not data[0, 256:384].nan_to_num().any()
    for group in (0, 3):
        at = slice(128 * group, 128 * group + 128)
        assert torch.equal(data[0, at], clean[0, at].float()) and scale[0, group].isfinite()


@pytest.mark.parametrize("scale", ["fp32", "ue8m0"])
def test_values_below_the_floor(scale):
    # The smallest denormal, alone in its group: the scale is the floor's, the data zero.
    x = torch.zeros(1, 128, dtype=torch.bfloat16)
    x[0, 5] = 2.0**-133
    data, s = reference.group_quant(x, QuantSpec(scale=scale))
    assert not data.float().any()
    smallest = torch.tensor(1e-10) / 448
    assert s.item() == (smallest.item() if scale == "fp32" else 2.0**-42)  # 1e-10 / 448 = 0.98 * 2**-42


@pytest.mark.parametrize("exponent", range(-64, 127))
def test_rounding_up_to_a_power_of_two(exponent):
    power = torch.tensor(2.0**exponent)
    zero, inf = torch.tensor(0.0), torch.tensor(float("inf"))
    around = torch.stack([torch.nextafter(power, zero), power, torch.nextafter(power, inf), power * 2])
    expected = [2.0**exponent, 2.0**exponent, 2.0 ** (exponent + 1), 2.0 ** (exponent + 1)]
    assert reference.round_up_to_power_of_two(around).tolist() == expected


def test_rounding_up_what_is_not_finite():
    got = reference.round_up_to_power_of_two(torch.tensor([float("inf"), float("nan"), 3.4e38]))
    assert got[0] == float("inf") and got[1].isnan() and got[2] == float("inf")


@pytest.mark.parametrize("dtype", DTYPES)
def test_ue8m0_is_the_ceiling_of_log2_for_every_amax(dtype):
    # every positive finite value as the only one of its group
    largest = torch.finfo(dtype).max
    every = torch.arange(1, 0x7F80, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[(every <= largest) & (every > 1e-10)]
    x = F.pad(every.unsqueeze(1), (0, 31))
    _, scale = reference.group_quant(x, QuantSpec(group=32, scale="ue8m0", scale_by="divide"))
    assert torch.equal(scale.squeeze(1).double(), torch.exp2((every.double() / 448).log2().ceil()))
