"""The kernel for q's rotary embedding, interpreted on CPU, against the reference: equal to the bit."""

import pytest
import torch
from shared import interpreter
from shared.compare import assert_bitwise
from shared.inputs import activations, awkward

from normquant import QuantSpec, reference

H, D, R = 16, 192, 64  # DeepSeek-R1 on one of eight GPUs
POSITIONS = 64


def angles(r: int = R, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.arange(POSITIONS).unsqueeze(1) * 10000.0 ** (-torch.arange(r // 2) / (r // 2))
    cache = torch.cat((angle.cos(), angle.sin()), dim=1).to(dtype)  # [positions, R], as vLLM holds it
    return cache, cache[:, r // 2 :]


def check(x, heads=H, r=R, *, positions=None, rope="interleaved", rounding="twice", cache_dtype=torch.bfloat16):
    args = (x, *angles(r, cache_dtype), positions, heads, r, rope, QuantSpec(rounding=rounding))
    got = interpreter.run("rope_last", *args)
    assert_bitwise((got,), (reference.rope_last(*args),))
    return got


@pytest.mark.parametrize("rope", ["interleaved", "half", "interleaved_to_half"])
@pytest.mark.parametrize("rounding", ["none", "inner", "once", "twice"])
def test_every_rope_and_rounding(rope, rounding):
    check(activations(3, H * D), rope=rope, rounding=rounding, positions=torch.tensor([5, 0, 63]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("positions", [None, torch.int32, torch.int64])
@pytest.mark.parametrize("m", [0, 1, 9])
def test_every_form(m, positions, dtype):
    at = None if positions is None else (torch.arange(m).flip(0) * 3).to(positions)
    x = awkward(m, H * D, dtype, strided=m == 9)
    check(x, positions=at, cache_dtype=torch.float32 if m == 9 else dtype)


@pytest.mark.parametrize("rope", ["interleaved", "half", "interleaved_to_half"])
@pytest.mark.parametrize(
    ("heads", "d", "r"),
    [(3, 192, 64), (3, 64, 64), (128, 192, 64), (1, 576, 64), (5, 40, 24), (7, 66, 2), (2, 8192, 128)],
    ids=str,
)
def test_other_heads(heads, d, r, rope):
    # programs that end within a row, widths that are no power of two, heads that are turned as a whole
    check(activations(3, heads * d), heads, r, rope=rope, positions=torch.tensor([1, 40, 7]))


def test_rows_that_are_not_aligned():
    wide = activations(5, H * D + 3)
    check(wide[:, : H * D])
    check(wide[:, 1 : H * D + 1])


def test_what_is_not_turned_is_copied_to_the_bit():
    # every pattern of 16 bits, the NaNs among them: no conversion touches what is copied
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(torch.bfloat16).view(-1, 128)
    x = torch.cat((every, activations(len(every), R)), dim=1).view(32, H * D)
    got = check(x).view(-1, D)[:, : D - R]
    assert torch.equal(got.view(torch.int16), every.view(torch.int16))


def test_position_zero_turns_nothing():
    x = activations(4, H * D)
    assert torch.equal(check(x, positions=torch.zeros(4, dtype=torch.int64)), x)
