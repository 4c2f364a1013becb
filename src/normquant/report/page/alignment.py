"""Two timelines side by side: which launches are in both, which vanished, which are new.

Matrix products are nearly always the same in both, and so anchor the rest: what stands between two of them is compared
by what it computes. Every layer of a model is thereby aligned in the same way.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import zip_longest

from normquant.report.page.timeline import PRODUCT, Step, Timeline

SAME, CHANGED, GONE, NEW = "same", "changed", "gone", "new"  # CHANGED: the same computation, other bytes

Pair = tuple[int | None, int | None]


@dataclass(frozen=True)
class Row:
    """One line of the drawing: for each side the number of its step, or None, and what became of it."""

    steps: tuple[int | None, ...]
    changes: tuple[str, ...]


def rows(sides: Sequence[Timeline]) -> list[Row]:
    """The rows of one timeline, or of two."""
    if len(sides) == 1:
        return [Row((n,), (SAME,)) for n in range(len(sides[0].steps))]
    before, after = sides
    return [Row(pair, _changes(pair, before, after)) for pair in _pairs(before.steps, after.steps)]


def _changes(pair: Pair, before: Timeline, after: Timeline) -> tuple[str, str]:
    a, b = pair
    if a is None or b is None or before.steps[a].origin != after.steps[b].origin:
        return GONE, NEW
    change = SAME if before.steps[a].bytes == after.steps[b].bytes else CHANGED
    return change, change


def _pairs(before: Sequence[Step], after: Sequence[Step]) -> Iterator[Pair]:
    products = [[n for n, step in enumerate(side) if step.kind == PRODUCT] for side in (before, after)]
    names = [
        [(s[n].origin, s[n].bytes[1]) for n in numbers] for s, numbers in zip((before, after), products, strict=True)
    ]
    a = b = 0
    for i, j in [*_common(*names), (len(products[0]), len(products[1]))]:
        next_a, next_b = (p[n] if n < len(p) else None for p, n in zip(products, (i, j), strict=True))
        end_a, end_b = len(before) if next_a is None else next_a, len(after) if next_b is None else next_b
        yield from _between(before, after, (a, end_a), (b, end_b))
        if next_a is not None:
            yield next_a, next_b
        a, b = end_a + 1, end_b + 1


def _between(
    before: Sequence[Step], after: Sequence[Step], span_a: tuple[int, int], span_b: tuple[int, int]
) -> Iterator[Pair]:
    """The steps of two spans: up to the next common one, those that are gone beside those that came."""
    a, b = span_a[0], span_b[0]
    origins = [s.origin for s in before[slice(*span_a)]], [s.origin for s in after[slice(*span_b)]]
    for i, j in [*_common(*origins), (span_a[1] - span_a[0], span_b[1] - span_b[0])]:
        yield from zip_longest(range(a, span_a[0] + i), range(b, span_b[0] + j))
        a, b = span_a[0] + i, span_b[0] + j
        if a < span_a[1] and b < span_b[1]:
            yield a, b
        a, b = a + 1, b + 1


def _common(one: Sequence[Hashable], other: Sequence[Hashable]) -> list[tuple[int, int]]:
    """Places of equal elements, in order in both."""
    if one == other:
        return [(n, n) for n in range(len(one))]
    blocks = SequenceMatcher(None, one, other, autojunk=False).get_matching_blocks()
    return [(block.a + n, block.b + n) for block in blocks for n in range(block.size)]
