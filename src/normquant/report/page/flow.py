"""What is drawn of one side: a box for each launch, and ribbons for what launches pass on.

Rows are numbered as they are drawn: a block that repeats is drawn once, so that a row stands for `count` launches. A
ribbon leaves the row that writes its buffer and ends at the last row that reads it. Within a block that repeats, its
parts say in which copies they belong: what comes from before the block in the first, what a copy hands to the next in
the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from normquant.report.page.alignment import Row
from normquant.report.page.folding import Block
from normquant.report.page.timeline import Timeline

FIRST, LATER, NOT_LAST, LAST = "first", "later", "not-last", "last"  # the copies of a block that a part belongs to


@dataclass(frozen=True)
class Place:
    """Where a step is drawn: its row, the block of that row, and in which copy of the block it runs."""

    row: int
    block: int
    copy: int


@dataclass
class Ribbon:
    """What is known of one buffer, while the edges are gathered: who reads it, by row, in bytes."""

    source: Place
    buffer: str
    here: dict[int, int] = field(default_factory=dict)  # rows of the same copy
    carried: dict[int, int] = field(default_factory=dict)  # rows of a later copy of the same block
    beyond: dict[Place, int] = field(default_factory=dict)  # rows of later blocks
    track: float = 0.0

    @property
    def bytes(self) -> int:
        return max([*self.here.values(), *self.carried.values(), *self.beyond.values()])


@dataclass(frozen=True)
class Part:
    """A ribbon within one block. starts, ends: a row, or None for the upper and lower edge of the block."""

    starts: int | None
    ends: int | None
    taps: tuple[tuple[int, int], ...]  # (row, bytes read there)
    copies: str = ""


def places(rows: Sequence[Row], blocks: Sequence[Block], side: int) -> dict[int, Place]:
    """Step -> where it is drawn."""
    found: dict[int, Place] = {}
    drawn = 0
    for number, block in enumerate(blocks):
        for row in range(block.start, block.end):
            step = rows[row].steps[side]
            copy, offset = divmod(row - block.start, block.length)
            if step is not None:
                found[step] = Place(drawn + offset, number, copy)
        drawn += block.length
    return found


def inputs(timeline: Timeline, where: dict[int, Place]) -> dict[int, dict[str, int]]:
    """Row -> the buffers from outside that it reads, with their bytes."""
    found: dict[int, dict[str, int]] = {}
    for edge in timeline.passed:
        place = where[edge.target]
        if edge.source is None and place.copy == 0:
            found.setdefault(place.row, {})[edge.buffer] = edge.bytes
    return found


def ribbons(timeline: Timeline, where: dict[int, Place], blocks: Sequence[Block]) -> list[Ribbon]:
    """All that launches pass on, one ribbon a buffer."""
    found: dict[tuple[int, object], Ribbon] = {}
    for edge in timeline.passed:
        if edge.source is None:
            continue
        source, target = where[edge.source], where[edge.target]
        if source.block == target.block and source.copy and target.copy:
            continue  # as in the first copy
        writes = list(timeline.steps[edge.source].data["writes"])
        written = writes.index(edge.buffer) if edge.buffer in writes else 0  # a view has a name of its own
        ribbon = found.setdefault((source.row, written), Ribbon(source, edge.buffer))
        if source.block != target.block:
            ribbon.beyond[target] = edge.bytes
        elif source.copy == target.copy:
            ribbon.here[target.row] = edge.bytes
        else:
            ribbon.carried[target.row] = edge.bytes
    return [found[key] for key in sorted(found, key=lambda key: (key[0], str(key[1])))]


def is_straight(ribbon: Ribbon, drawn: Sequence[int]) -> bool:
    """Whether the only reader is the next row of this side; `drawn` are its rows in order."""
    if ribbon.carried or ribbon.beyond or len(ribbon.here) != 1:
        return False
    place = drawn.index(ribbon.source.row)
    return drawn[place + 1] in ribbon.here


def parts(ribbon: Ribbon, blocks: Sequence[Block]) -> Iterator[tuple[int, Part]]:
    """(block, part) for all blocks that a ribbon goes through."""
    own = ribbon.source.block
    last = max((place.block for place in ribbon.beyond), default=own)
    start, within = ribbon.source.row, max(ribbon.here, default=ribbon.source.row)
    if ribbon.here:
        yield own, Part(start, within, _taps(ribbon.here))
    if ribbon.carried:
        yield own, Part(within, None, (), NOT_LAST)
        yield own, Part(None, max(ribbon.carried), _taps(ribbon.carried), LATER)
    if last > own:
        yield own, Part(within, None, (), LAST if blocks[own].count > 1 else "")
    for block in range(own + 1, last + 1):
        yield from ((block, part) for part in _passing(ribbon, block, last, blocks[block].count > 1))


def _passing(ribbon: Ribbon, block: int, last: int, repeats: bool) -> Iterator[Part]:
    """The parts of a ribbon in a block that it enters from above."""
    here = {place: count for place, count in ribbon.beyond.items() if place.block == block}
    rows = {place.row: count for place, count in here.items()}
    if block < last:
        yield Part(None, None, _taps(rows))
    elif repeats and any(place.copy for place in here):  # later copies read it, too: down to the last one
        yield Part(None, max(rows), _taps(rows))
        yield Part(max(rows), None, (), NOT_LAST)
    else:
        yield Part(None, max(rows), _taps(rows), FIRST if repeats else "")


def _taps(rows: dict[int, int]) -> tuple[tuple[int, int], ...]:
    return tuple(sorted(rows.items()))


def spread(
    ribbons: Sequence[Ribbon], width: dict[int, float], blocks: Sequence[Block], gap: float, most: float
) -> float:
    """Give each ribbon a track beside the boxes, the shortest nearest to them; the width of all tracks.

    width: by the ribbon's place in `ribbons`. No two that pass the same row overlap, unless all would be wider than
    `most`: what is beyond shares the last place.
    """
    first = [sum(b.length for b in blocks[:n]) for n in range(len(blocks) + 1)]
    spans = [_span(ribbon, first) for ribbon in ribbons]
    placed: list[int] = []
    widest = 0.0
    for n in sorted(width, key=lambda n: (spans[n][1] - spans[n][0], n)):
        low, high = spans[n]
        taken = sorted((ribbons[o].track, width[o]) for o in placed if spans[o][0] < high and low < spans[o][1])
        x = 0.0
        for left, other in taken:
            if left - x >= width[n] + gap:
                break
            x = max(x, left + other + gap)
        ribbons[n].track = min(x, most - width[n])
        widest = max(widest, ribbons[n].track + width[n])
        placed.append(n)
    return widest


def _span(ribbon: Ribbon, first: Sequence[int]) -> tuple[float, float]:
    """The rows that a ribbon passes, from the lower edge of one to the upper edge of another."""
    own = ribbon.source
    ends = [*ribbon.here, *(place.row for place in ribbon.beyond)]
    for place in ribbon.beyond:
        ends += [first[place.block + 1]] * bool(place.copy)
    if ribbon.carried:
        return first[own.block] - 0.5, max([*ends, first[own.block + 1]])
    return own.row, max(ends)
