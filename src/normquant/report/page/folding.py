"""Repeated layers: runs of rows that follow each other several times, as one block with a count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from normquant.report.page.alignment import Row
from normquant.report.page.timeline import Step, Timeline

FEWEST_COPIES = 3
SHORTEST = 4  # rows: fewer are no layer, but one kernel that is launched for several tensors
LONGEST = 400  # rows of a layer, or of as many layers as differ


@dataclass(frozen=True)
class Block:
    """`length` rows from `start` on, `count` times one after the other."""

    start: int
    length: int
    count: int = 1

    @property
    def end(self) -> int:
        return self.start + self.length * self.count


def blocks(rows: Sequence[Row], sides: Sequence[Timeline]) -> list[Block]:
    """All rows, those that repeat as one block."""
    return _fold([_symbol(row, sides) for row in rows], 0, len(rows))


@dataclass(frozen=True)
class _Launch:
    """What of a launch must be equal for it to be drawn once: the kernel, its bytes, and what is wrong with it."""

    name: str
    bytes: tuple[int, int]
    first: bool
    rules: tuple[str, ...]


@dataclass(frozen=True)
class Symbol:
    """A row, as it is compared with others."""

    changes: tuple[str, ...]
    sides: tuple[_Launch | None, ...]


def _symbol(row: Row, sides: Sequence[Timeline]) -> Symbol:
    steps = (None if n is None else side.steps[n] for n, side in zip(row.steps, sides, strict=True))
    return Symbol(row.changes, tuple(None if step is None else _launch(step) for step in steps))


def _launch(step: Step) -> _Launch:
    return _Launch(step.data["name"], step.bytes, step.first, tuple(finding["rule"] for finding in step.findings))


def _fold(symbols: Sequence[Symbol], start: int, end: int, heads: frozenset[Symbol] = frozenset()) -> list[Block]:
    """The blocks of symbols[start:end]: the repetition that saves most rows, and what stands around it.

    heads: first rows of repetitions found so far, which others like to begin with, too.
    """
    best = _longest(symbols, start, end, heads)
    if best is None:
        return [Block(start, end - start)] if end > start else []
    heads |= {symbols[best.start]}
    return [*_fold(symbols, start, best.start, heads), best, *_fold(symbols, best.end, end, heads)]


def _longest(symbols: Sequence[Symbol], start: int, end: int, heads: frozenset[Symbol]) -> Block | None:
    best, saved = None, 0
    for length in range(SHORTEST, min(LONGEST, (end - start) // FEWEST_COPIES) + 1):
        run = 0  # of places that are equal to the place one length before
        for place in range(start + length, end + 1):
            if place < end and symbols[place] == symbols[place - length]:
                run += 1
                continue
            count = run // length + 1
            if count >= FEWEST_COPIES and (count - 1) * length > saved:
                saved = (count - 1) * length
                best = Block(_beginning(symbols, place - run - length, run % length, heads), length, count)
            run = 0
    return best


def _beginning(symbols: Sequence[Symbol], first: int, freedom: int, heads: frozenset[Symbol]) -> int:
    """Where one starts that could start up to `freedom` rows later: as others do, with a program, or at once."""
    starts = range(first, first + freedom + 1)
    known = (start for start in starts if symbols[start] in heads)
    programs = (start for start in starts if any(side is not None and side.first for side in symbols[start].sides))
    return next(known, next(programs, first))
