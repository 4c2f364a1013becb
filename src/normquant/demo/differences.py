"""How far two tensors are apart, counted in values and in steps between neighbouring numbers of their format."""

from __future__ import annotations

from dataclasses import dataclass

import torch

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Tally:
    """How many values were compared, how many differ, and by how many steps of the format at most."""

    compared: int = 0
    differ: int = 0
    steps: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.compared + other.compared, self.differ + other.differ, max(self.steps, other.steps))


def tally(expected: torch.Tensor, given: torch.Tensor) -> Tally:
    """Compare two tensors value by value; zeros of different sign differ by one step, all NaNs are one value.

    Raises ValueError where shape or dtype differ.
    """
    if expected.shape != given.shape or expected.dtype != given.dtype:
        raise ValueError(f"expected {tuple(expected.shape)} {expected.dtype}, got {tuple(given.shape)} {given.dtype}")
    a, b = _ordered(expected), _ordered(given)
    steps = (a - b).abs()
    differ = int((steps != 0).sum())
    return Tally(expected.numel(), differ, int(steps.max()) if differ else 0)


def _ordered(values: torch.Tensor) -> torch.Tensor:
    """Each value's place among the numbers of its format, int64: neighbours are one apart, -0 below 0, NaN on top."""
    if not values.is_floating_point():
        return values.to(torch.int64)
    bits = values.contiguous().view(BITS[values.itemsize]).to(torch.int64)
    sign = 1 << (values.itemsize * 8 - 1)
    magnitude = bits & (sign - 1)
    place = torch.where(bits & sign != 0, -magnitude - 1, magnitude)
    return torch.where(values.float().isnan(), sign, place)
