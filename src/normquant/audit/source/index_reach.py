"""How many different elements an index expression reaches.

A generated kernel counts with one number per loop (`xindex`, `r0_index`) and takes it apart with // and %. Every part
is a digit in a mixed radix: the interval [low, high) of its loop, of which it has high / low values. An index reaches
as many elements as the digits in it have values, which is exact for indices that do not fold two digits together.
"""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Digit:
    """`(loop // low) % (high // low)`."""

    loop: str
    low: int
    high: int

    @property
    def size(self) -> int:
        return max(1, -(-self.high // self.low))

    def divided(self, by: int) -> "Digit":
        return Digit(self.loop, min(self.low * by, self.high), self.high)

    def modulo(self, by: int) -> "Digit":
        return Digit(self.loop, self.low, min(self.high, self.low * by))


@dataclass(frozen=True)
class Bound:
    """A condition under which a load happens: low <= digit < high."""

    digit: Digit
    low: int
    high: int


def distinct(digits: Iterable[Digit], bounds: Iterable[Bound] = ()) -> int:
    """How many values the digits take together, under the bounds."""
    loops: dict[str, set[Digit]] = {}
    for digit in digits:
        loops.setdefault(digit.loop, set()).add(digit)
    limits: dict[Digit, int] = {}
    for bound in bounds:
        _narrow(limits, bound)
    total = 1
    for parts in loops.values():
        total *= _of_loop(parts, {d: size for d, size in limits.items() if d.loop == next(iter(parts)).loop})
    return total


def _narrow(limits: dict[Digit, int], bound: Bound) -> None:
    inside = max(0, min(bound.high, bound.digit.size) - max(bound.low, 0))
    limits[bound.digit] = min(limits.get(bound.digit, bound.digit.size), inside)


def _of_loop(parts: set[Digit], limits: Mapping[Digit, int]) -> int:
    """Values of digits of one loop: every elementary interval that a digit covers counts once."""
    edges = sorted({edge for d in (*parts, *limits) for edge in (d.low, d.high)})
    covered = [(a, b) for a, b in itertools.pairwise(edges) if any(d.low <= a and b <= d.high for d in parts)]
    total = 1
    for digit, size in limits.items():
        inside = [(a, b) for a, b in covered if digit.low <= a and b <= digit.high]
        if inside and inside[0][0] == digit.low and inside[-1][1] == digit.high:  # all of it is in the index
            total *= size
            covered = [pair for pair in covered if pair not in inside]
    for low, high in covered:
        total *= max(1, -(-high // low))
    return total


def merge(bounds: Iterable[Bound]) -> tuple[Bound, ...]:
    """The bounds with those of one digit intersected."""
    found: dict[Digit, Bound] = {}
    for bound in bounds:
        held = found.get(bound.digit, bound)
        found[bound.digit] = Bound(bound.digit, max(held.low, bound.low), min(held.high, bound.high))
    return tuple(found.values())
