"""How many different elements an index expression reaches.

A generated kernel has one counter per loop (`xindex`, `r0_index`) and decomposes it with // and %. Each part is a digit
in a mixed radix: the interval [low, high) of its loop, with high / low values. An index reaches as many elements as its
digits have combinations, which is exact for indices that do not add two digits to the same place.
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


Terms = tuple[tuple[Digit, int], ...]  # (digit, coefficient): a linear index without its constant
Segment = tuple[str, int, int, int]  # (loop, low, high, coefficient)


@dataclass(frozen=True)
class Bound:
    """A condition on a load or a store: low <= digit < high."""

    digit: Digit
    low: int
    high: int


def distinct(digits: Iterable[Digit], bounds: Iterable[Bound] = ()) -> int:
    """How many combinations of values the digits take within the bounds."""
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
    """Combinations of the digits of one loop: every elementary interval that a digit covers counts once."""
    edges = sorted({edge for d in (*parts, *limits) for edge in (d.low, d.high)})
    covered = [(a, b) for a, b in itertools.pairwise(edges) if any(d.low <= a and b <= d.high for d in parts)]
    total = 1
    for digit, size in limits.items():
        inside = [(a, b) for a, b in covered if digit.low <= a and b <= digit.high]
        if inside and inside[0][0] == digit.low and inside[-1][1] == digit.high:  # the whole digit is in the index
            total *= size
            covered = [pair for pair in covered if pair not in inside]
    for low, high in covered:
        total *= max(1, -(-high // low))
    return total


def merge(bounds: Iterable[Bound]) -> tuple[Bound, ...]:
    """One bound per digit: the intersection of its bounds."""
    found: dict[Digit, Bound] = {}
    for bound in bounds:
        held = found.get(bound.digit, bound)
        found[bound.digit] = Bound(bound.digit, max(held.low, bound.low), min(held.high, bound.high))
    return tuple(found.values())


def segments(terms: Terms, cut_at: Mapping[str, set[int]] | None = None) -> frozenset[Segment]:
    """A linear index over elementary intervals.

    Two indices that are the same function have the same segments when both are cut at the same edges of every loop.
    """
    found: dict[tuple[str, int, int], int] = {}
    for digit, coefficient in terms:
        inner = {cut for cut in (cut_at or {}).get(digit.loop, ()) if digit.low < cut < digit.high}
        for low, high in itertools.pairwise(sorted({digit.low, digit.high, *inner})):
            part = (digit.loop, low, high)
            found[part] = found.get(part, 0) + coefficient * (low // digit.low)
    return frozenset((*part, coefficient) for part, coefficient in found.items() if coefficient)


def cuts(*indices: Terms) -> dict[str, set[int]]:
    """Every edge of every digit in linear indices, by loop."""
    found: dict[str, set[int]] = {}
    for digit, _ in itertools.chain(*indices):
        found.setdefault(digit.loop, set()).update((digit.low, digit.high))
    return found


def only_permutes(parts: frozenset[Segment]) -> bool:
    """Whether different values of the loop counters reach different elements, all upwards: no flip, no overlap."""
    reach = 0
    for _, low, high, coefficient in sorted(parts, key=lambda part: part[3]):
        if coefficient <= reach:
            return False
        reach += coefficient * (-(-high // low) - 1)
    return True
