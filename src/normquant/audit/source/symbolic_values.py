"""What is known of a name in a generated kernel while its body is read, and the loads and stores that result."""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from normquant.audit.size_expressions import LARGEST
from normquant.audit.source.index_reach import Bound, Digit, cuts, merge, only_permutes, segments


@dataclass(frozen=True)
class SymbolicValue:
    """One value: a number, an index, a condition, a pointer with an index, or data that was loaded.

    `linear` is the value as a sum of coefficient * digit, plus `constant`; None when it is not linear. `digits` are all
    the digits that it depends on, linear or not.
    """

    linear: tuple[tuple[Digit, int], ...] | None = None
    constant: int = 0
    digits: frozenset[Digit] = frozenset()
    bounds: tuple[Bound, ...] | None = None  # of a condition; None when it is not a condition
    opaque: bool = False  # a condition that its bounds do not fully describe
    pointer: str | None = None  # the kernel parameter that it points into
    loaded: "MemoryOp | None" = None  # the load that the data comes from, unchanged but for casts
    casts: tuple[str, ...] = ()  # the dtypes that the data was converted to
    indirect: bool = False  # it depends on loaded data

    @property
    def number(self) -> int | None:
        return self.constant if self.linear == () and not self.indirect and self.pointer is None else None


@dataclass(frozen=True)
class MemoryOp:
    """A load or a store in a kernel."""

    pointer: str
    index: SymbolicValue
    bounds: tuple[Bound, ...] = ()
    masked: bool = False  # under a condition other than the ends of the loops
    section: int = 0  # which pass over the row it is in
    order: int = 0

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for two accesses that reach the same elements."""
        if self.index.linear is None:
            return (self.pointer, self.order)
        return (self.pointer, segments(self.index.linear), self.index.constant, self.bounds)


@dataclass(frozen=True)
class StoredValue:
    """A store, and the value stored."""

    op: MemoryOp
    value: SymbolicValue
    atomic: bool = False


@dataclass
class MemoryOps:
    """All loads and stores of a kernel, at one set of loop sizes."""

    loads: list[MemoryOp] = field(default_factory=list)
    stores: list[StoredValue] = field(default_factory=list)

    def plain_copies(self, dtypes: Mapping[str, str]) -> Iterator[tuple[str, str, bool, tuple[str, ...]]]:
        """(from, to, same place, dtypes on the way) of every store of data that is only moved and converted.

        `dtypes` are those of the pointers.
        """
        for stored in self.stores:
            load, store = stored.value.loaded, stored.op
            if load is None or stored.atomic or load.masked or store.masked or load.index.indirect:
                continue
            if load.index.linear is None or store.index.linear is None:
                continue
            edges = cuts(load.index.linear, store.index.linear)
            source, destination = segments(load.index.linear, edges), segments(store.index.linear, edges)
            same = load.index.constant == store.index.constant and source == destination
            if same or (only_permutes(source) and {s[:3] for s in source} == {d[:3] for d in destination}):
                on_the_way = (dtypes.get(load.pointer, ""), *stored.value.casts, dtypes.get(store.pointer, ""))
                yield load.pointer, store.pointer, same, on_the_way


UNKNOWN = SymbolicValue()


def number(value: int) -> SymbolicValue:
    """A known number."""
    return SymbolicValue(linear=(), constant=value)


def loop(name: str, size: int) -> SymbolicValue:
    """The counter of a loop of `size` iterations."""
    if size <= 1:
        return number(0)
    digit = Digit(name, 1, size)
    return SymbolicValue(linear=((digit, 1),), digits=frozenset((digit,)))


def combined(parts: Iterable[SymbolicValue]) -> SymbolicValue:
    """Something computed from the parts in a way that is not followed."""
    parts = tuple(parts)
    return SymbolicValue(
        digits=frozenset().union(*(part.digits for part in parts)) if parts else frozenset(),
        indirect=any(part.indirect or part.loaded is not None for part in parts),
    )


def add(left: SymbolicValue, right: SymbolicValue, sign: int = 1) -> SymbolicValue:
    if left.linear is None or right.linear is None or left.loaded or right.loaded:
        return combined((left, right))
    terms = dict(left.linear)
    if abs(left.constant) + abs(right.constant) > LARGEST:
        return combined((left, right))
    for digit, coefficient in right.linear:
        terms[digit] = terms.get(digit, 0) + sign * coefficient
    return SymbolicValue(tuple(terms.items()), left.constant + sign * right.constant, left.digits | right.digits)


def multiply(left: SymbolicValue, right: SymbolicValue) -> SymbolicValue:
    factor = left.number if left.number is not None else right.number
    other = right if left.number is not None else left
    if factor is None or other.linear is None or other.loaded or abs(factor) > LARGEST:
        return combined((left, right))
    scaled = SymbolicValue(tuple((d, c * factor) for d, c in other.linear), other.constant * factor, other.digits)
    numbers = (scaled.constant, *(c for _, c in scaled.linear or ()))
    return scaled if all(abs(n) <= LARGEST for n in numbers) else combined((left, right))


def divide(left: SymbolicValue, right: SymbolicValue) -> SymbolicValue:
    return _digitwise(left, right, Digit.divided, operator.floordiv)


def modulo(left: SymbolicValue, right: SymbolicValue) -> SymbolicValue:
    return _digitwise(left, right, Digit.modulo, operator.mod)


def _digitwise(
    left: SymbolicValue, right: SymbolicValue, part: Callable[[Digit, int], Digit], whole: Callable[[int, int], int]
) -> SymbolicValue:
    by = right.number
    if by is None or by <= 0:
        return combined((left, right))
    if left.number is not None:
        return number(whole(left.number, by))
    if left.linear is not None and len(left.linear) == 1 and left.linear[0][1] == 1 and left.constant == 0:
        digit = part(left.linear[0][0], by)
        return number(0) if digit.size <= 1 else SymbolicValue(((digit, 1),), 0, frozenset((digit,)))
    return replace(combined((left, right)), indirect=left.indirect)


def compare(left: SymbolicValue, right: SymbolicValue, at_least: bool, limit_shift: int) -> SymbolicValue:
    """The condition left < right (with `at_least`, left >= right) as a bound on a digit, where it is one.

    `limit_shift` is 1 for <= and >, which are < and >= of the next number.
    """
    limit = right.number
    plain = left.linear is not None and len(left.linear) == 1 and left.linear[0][1] == 1 and left.constant == 0
    if limit is None or not plain or left.linear is None:
        return SymbolicValue(bounds=(), opaque=True)
    digit, limit = left.linear[0][0], limit + limit_shift
    bound = Bound(digit, limit, digit.size) if at_least else Bound(digit, 0, limit)
    return SymbolicValue(bounds=(bound,))


def both(left: SymbolicValue, right: SymbolicValue) -> SymbolicValue:
    """Both conditions together."""
    if left.bounds is None and right.bounds is None:
        return combined((left, right))
    bounds = merge((*(left.bounds or ()), *(right.bounds or ())))
    opaque = left.opaque or right.opaque or left.bounds is None or right.bounds is None
    return SymbolicValue(bounds=bounds, opaque=opaque)
