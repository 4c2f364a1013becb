"""What is known of a name inside a generated kernel while its body is read, statement by statement."""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from normquant.audit.source.index_reach import Bound, Digit, merge

_LARGEST = 1 << 62  # beyond any address; hostile text could make numbers that never end


@dataclass(frozen=True)
class Value:
    """One value: a number, an index, a condition, a pointer with an index, or data that was loaded.

    `linear` is the value as a sum of coefficient * digit plus `constant`; None when it is not one. `digits` is every
    digit that it depends on, linear or not.
    """

    linear: tuple[tuple[Digit, int], ...] | None = None
    constant: int = 0
    digits: frozenset[Digit] = frozenset()
    bounds: tuple[Bound, ...] | None = None  # a condition: what it implies; None when it is not a condition
    opaque: bool = False  # a condition that is more than its bounds
    pointer: str | None = None  # the kernel parameter that it points into
    loaded: "Site | None" = None  # data: straight from this load
    casts: tuple[str, ...] = ()  # data: converted to these on the way
    indirect: bool = False  # it depends on data

    @property
    def number(self) -> int | None:
        return self.constant if self.linear == () and not self.indirect and self.pointer is None else None


@dataclass(frozen=True)
class Site:
    """A load or a store in a kernel."""

    pointer: str
    index: Value
    bounds: tuple[Bound, ...] = ()
    masked: bool = False  # a condition other than the bounds of the loops
    section: int = 0  # which pass over the row it is in
    order: int = 0

    @property
    def key(self) -> tuple[object, ...]:
        """The same for two sites that reach the same elements."""
        if self.index.linear is None:
            return (self.pointer, self.order)
        return (self.pointer, segments(self.index), self.index.constant, self.bounds)


@dataclass(frozen=True)
class Stored:
    """A store, and what is stored."""

    site: Site
    value: Value
    atomic: bool = False


@dataclass
class Uses:
    """All loads and stores of a kernel, at one set of loop sizes."""

    loads: list[Site] = field(default_factory=list)
    stores: list[Stored] = field(default_factory=list)


UNKNOWN = Value()


def number(value: int) -> Value:
    return Value(linear=(), constant=value)


def loop(name: str, size: int) -> Value:
    """The counter of a loop of `size` turns."""
    if size <= 1:
        return number(0)
    digit = Digit(name, 1, size)
    return Value(linear=((digit, 1),), digits=frozenset((digit,)))


def combined(parts: Iterable[Value]) -> Value:
    """Something computed from the parts."""
    parts = tuple(parts)
    return Value(
        digits=frozenset().union(*(part.digits for part in parts)) if parts else frozenset(),
        indirect=any(part.indirect or part.loaded is not None for part in parts),
    )


def add(left: Value, right: Value, sign: int = 1) -> Value:
    if left.linear is None or right.linear is None or left.loaded or right.loaded:
        return combined((left, right))
    terms = dict(left.linear)
    if abs(left.constant) + abs(right.constant) > _LARGEST:
        return combined((left, right))
    for digit, coefficient in right.linear:
        terms[digit] = terms.get(digit, 0) + sign * coefficient
    return Value(tuple(terms.items()), left.constant + sign * right.constant, left.digits | right.digits)


def multiply(left: Value, right: Value) -> Value:
    factor = left.number if left.number is not None else right.number
    other = right if left.number is not None else left
    if factor is None or other.linear is None or other.loaded or abs(factor) > _LARGEST:
        return combined((left, right))
    scaled = Value(tuple((d, c * factor) for d, c in other.linear), other.constant * factor, other.digits)
    numbers = (scaled.constant, *(c for _, c in scaled.linear or ()))
    return scaled if all(abs(n) <= _LARGEST for n in numbers) else combined((left, right))


def divide(left: Value, right: Value) -> Value:
    return _digitwise(left, right, Digit.divided, lambda a, b: a // b)


def modulo(left: Value, right: Value) -> Value:
    return _digitwise(left, right, Digit.modulo, lambda a, b: a % b)


def _digitwise(left: Value, right: Value, part, whole) -> Value:  # type: ignore[no-untyped-def]
    by = right.number
    if by is None or by <= 0:
        return combined((left, right))
    if left.number is not None:
        return number(whole(left.number, by))
    if left.linear is not None and len(left.linear) == 1 and left.linear[0][1] == 1 and left.constant == 0:
        digit = part(left.linear[0][0], by)
        return number(0) if digit.size <= 1 else Value(((digit, 1),), 0, frozenset((digit,)))
    return replace(combined((left, right)), indirect=left.indirect)


def compare(left: Value, right: Value, at_least: bool, limit_shift: int) -> Value:
    """The condition `left < right` (or, `at_least`, left >= right) as a bound on a digit, where it is one.

    `limit_shift` is 1 for <= and >, which are < and >= of the next number.
    """
    limit = right.number
    plain = left.linear is not None and len(left.linear) == 1 and left.linear[0][1] == 1 and left.constant == 0
    if limit is None or not plain or left.linear is None:
        return Value(bounds=(), opaque=True)
    digit, limit = left.linear[0][0], limit + limit_shift
    bound = Bound(digit, limit, digit.size) if at_least else Bound(digit, 0, limit)
    return Value(bounds=(bound,))


def both(left: Value, right: Value) -> Value:
    """Two conditions at once."""
    if left.bounds is None and right.bounds is None:
        return combined((left, right))
    bounds = merge((*(left.bounds or ()), *(right.bounds or ())))
    opaque = left.opaque or right.opaque or left.bounds is None or right.bounds is None
    return Value(bounds=bounds, opaque=opaque)


def segments(value: Value, cuts: Mapping[str, set[int]] | None = None) -> frozenset[tuple[str, int, int, int]]:
    """A linear index as (loop, low, high, coefficient) over elementary intervals.

    Two indices that are the same function have the same segments if both are cut at the same edges of every loop.
    """
    found: dict[tuple[str, int, int], int] = {}
    for digit, coefficient in value.linear or ():
        inner = {cut for cut in (cuts or {}).get(digit.loop, ()) if digit.low < cut < digit.high}
        edges = sorted({digit.low, digit.high, *inner})
        for low, high in itertools.pairwise(edges):
            part = (digit.loop, low, high)
            found[part] = found.get(part, 0) + coefficient * (low // digit.low)
    return frozenset((*part, coefficient) for part, coefficient in found.items() if coefficient)


def cuts(*indices: Value) -> dict[str, set[int]]:
    """Every edge of every digit in linear indices, by loop."""
    found: dict[str, set[int]] = {}
    for index in indices:
        for digit, _ in index.linear or ():
            found.setdefault(digit.loop, set()).update((digit.low, digit.high))
    return found
