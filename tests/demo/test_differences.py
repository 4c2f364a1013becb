"""Counting how far two tensors are apart."""

from __future__ import annotations

import pytest
import torch

from normquant.demo.differences import Tally, tally


def bits(*values: int, dtype: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8).view(dtype)


def test_equal_tensors_do_not_differ() -> None:
    x = torch.randn(3, 5)
    assert tally(x, x.clone()) == Tally(15, 0, 0)


def test_a_neighbour_is_one_step_away_in_every_format() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.tensor([1.0, -1.0, 0.5], dtype=dtype)
        up = torch.nextafter(x.clone(), torch.full_like(x, 9.0))
        assert tally(x, up) == Tally(3, 3, 1)


def test_steps_of_fp8_are_counted_across_zero() -> None:
    smallest_negative, smallest_positive = 0x81, 0x01
    assert tally(bits(smallest_negative), bits(smallest_positive)).steps == 3  # over -0 and 0


def test_zeros_of_different_sign_differ() -> None:
    assert tally(torch.tensor([0.0]), torch.tensor([-0.0])) == Tally(1, 1, 1)


def test_nans_are_one_value_and_far_from_numbers() -> None:
    assert tally(bits(0x7F), bits(0xFF)) == Tally(1, 0, 0)
    assert tally(bits(0x7F), bits(0x7E)) == Tally(1, 1, 2)


def test_integers_are_compared_as_they_are() -> None:
    assert tally(torch.tensor([1, 7]), torch.tensor([1, 4])) == Tally(2, 1, 3)


def test_nothing_to_compare() -> None:
    assert tally(torch.empty(0), torch.empty(0)) == Tally()


def test_tallies_add_up() -> None:
    assert Tally(5, 1, 2) + Tally(7, 0, 0) == Tally(12, 1, 2)


@pytest.mark.parametrize("given", [torch.zeros(3), torch.zeros(2, dtype=torch.bfloat16)])
def test_another_shape_or_dtype_is_an_error(given: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected \(2,\) torch.float32, got"):
        tally(torch.zeros(2), given)
