"""The approximate reciprocal as far as it can be told without a GPU; tests/gpu holds it against the instruction."""

import torch

from normquant import approximate_reciprocal


def every(dtype: torch.dtype) -> torch.Tensor:
    """Every finite value of a 16-bit dtype whose reciprocal is a normal number, as fp32."""
    values = torch.arange(0x10000, dtype=torch.int32).to(torch.int16).view(dtype).float()
    return values[values.isfinite() & (values.abs() > 2.0**-126) & (values.abs() < 2.0**126)]


def test_it_is_off_by_one_unit_at_most():
    for dtype, share in ((torch.bfloat16, 20 / 128), (torch.float16, 130 / 1024)):
        x = every(dtype)
        x = x[x.abs() >= torch.finfo(dtype).smallest_normal]
        off = approximate_reciprocal.approximate_reciprocal(x).view(torch.int32) - x.reciprocal().view(torch.int32)
        assert off.abs().max() == 1
        assert abs((off != 0).float().mean() - share) < 0.002


def test_powers_of_two_are_exact():
    x = torch.exp2(torch.arange(-120.0, 121.0))
    assert torch.equal(approximate_reciprocal.approximate_reciprocal(x), 1 / x)


def test_what_is_no_number_stays_so():
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0])
    assert torch.equal(approximate_reciprocal.approximate_reciprocal(x)[:2], torch.zeros(2))
    assert approximate_reciprocal.approximate_reciprocal(x)[
        2
    ].isnan() and approximate_reciprocal.approximate_reciprocal(x)[3] == float("inf")


def test_other_values_are_rounded_correctly():
    x = torch.tensor([1.0 + 2.0**-23, 3.1415927])
    assert torch.equal(approximate_reciprocal.approximate_reciprocal(x), x.reciprocal())
