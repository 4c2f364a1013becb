"""Boxes and ribbons in pixels: one drawing for each block and side, all with the same scales.

A box is as high as its launch takes time, a ribbon as wide as the square root of its bytes. Boxes stand below each
other in the order in which they run; what comes from outside enters from the left, and what is passed on to a row
further down goes around the boxes in between, on the right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from normquant.report.page import flow
from normquant.report.page.alignment import Row
from normquant.report.page.flow import Place
from normquant.report.page.folding import Block
from normquant.report.page.timeline import Step, Timeline, returned

LEFT, BOX, BESIDE = 46, 56, 9  # room for what comes from outside; a box; from it to the first ribbon
GAP, MOST = 4, 120  # between ribbons; all of them
TALLEST, PER_US = 240, 18  # of a box, and of a microsecond, whichever gives the smaller boxes
WIDEST, NARROWEST, LOWEST = 30.0, 1.2, 3.0  # ribbons; a box
ROW, AROUND, TURN = 48, 15, 13  # a row is at least so high; above and below a box; where a ribbon turns
BEND = 0.8  # of a curve's height: how long it keeps its direction at both ends
HEAD, TITLE = 44, 30  # the line above a block that repeats, and above the first launch of a program


@dataclass(frozen=True)
class Scaling:
    """Microseconds and bytes in pixels."""

    us: float
    bytes: float

    def height(self, us: float) -> float:
        return max(LOWEST, us * self.us)

    def width(self, count: float) -> float:
        return max(NARROWEST, math.sqrt(count) * self.bytes)


@dataclass(frozen=True)
class Path:
    """A line `width` wide."""

    d: str
    width: float


@dataclass(frozen=True)
class Strand:
    """The part of a ribbon in one block. ends: the rows that it connects."""

    paths: tuple[Path, ...]
    ends: tuple[int, ...]
    copies: str
    buffer: str
    bytes: int
    marked: bool


@dataclass(frozen=True)
class Box:
    """A launch, with the lines of what comes from outside and of what is returned."""

    row: int
    kind: str
    change: str
    y: float
    height: float
    inputs: Path | None
    results: Path | None


@dataclass
class Panel:
    """The drawing of one side of a block."""

    boxes: list[Box] = field(default_factory=list)
    strands: list[Strand] = field(default_factory=list)


@dataclass(frozen=True)
class Grid:
    """Where rows are: by drawn row, its upper edge within its block and its height; heights of blocks."""

    tops: tuple[float, ...]
    heights: tuple[float, ...]
    blocks: tuple[float, ...]


def scale(sides: Sequence[Timeline]) -> Scaling:
    """The scale of a page: the longest launch and the widest ribbon are as large as they may be."""
    steps = [step for side in sides for step in side.steps]
    longest = max((step.data["est_us"] for step in steps), default=1.0)
    most = max((sum(step.data["reads"].values()) for step in steps), default=1)
    return Scaling(min(PER_US, TALLEST / max(longest, 1e-6)), WIDEST / math.sqrt(max(most, 1)))


def grid(rows: Sequence[Row], blocks: Sequence[Block], sides: Sequence[Timeline], size: Scaling) -> Grid:
    """Heights that are the same for all sides, so that rows stand side by side."""
    several = any(len(side.report["programs"]) > 1 for side in sides)
    tops: list[float] = []
    heights: list[float] = []
    ends = []
    for block in blocks:
        y = float(HEAD if block.count > 1 else 0)
        for row in rows[block.start : block.start + block.length]:
            steps = [side.steps[n] for side, n in zip(sides, row.steps, strict=True) if n is not None]
            y += TITLE if several and any(step.first for step in steps) else 0
            tops.append(y)
            heights.append(max([ROW, *(size.height(step.data["est_us"]) + 2 * AROUND for step in steps)]))
            y += heights[-1]
        ends.append(y)
    return Grid(tuple(tops), tuple(heights), tuple(ends))


class SideDrawing:
    """All panels of one side, and how wide they are."""

    def __init__(
        self, timeline: Timeline, rows: Sequence[Row], blocks: Sequence[Block], side: int, size: Scaling, at: Grid
    ):
        self.timeline, self.blocks, self.size, self.grid = timeline, blocks, size, at
        self.places: dict[int, Place] = flow.places(rows, blocks, side)
        drawn = {place.row: n for n, place in self.places.items() if place.copy == 0}
        self.steps: dict[int, Step] = {row: timeline.steps[n] for row, n in sorted(drawn.items())}
        self.block_of = {place.row: place.block for place in self.places.values()}
        self.changes = {self.places[n].row: row.changes[side] for row in rows if (n := row.steps[side]) is not None}
        self.inputs = flow.inputs(timeline, self.places)
        self.ribbons = flow.ribbons(timeline, self.places, blocks)
        order = list(self.steps)
        self.straight = {n for n, ribbon in enumerate(self.ribbons) if flow.is_straight(ribbon, order)}
        widths = {n: size.width(r.bytes) for n, r in enumerate(self.ribbons) if n not in self.straight}
        self.width = LEFT + BOX + BESIDE + flow.spread(self.ribbons, widths, blocks, GAP, MOST) + GAP
        self.leaving, self.entering = self._ports()

    def panels(self) -> list[Panel]:
        """One a block."""
        found = [Panel() for _ in self.blocks]
        for row in self.steps:
            found[self.block_of[row]].boxes.append(self._box(row))
        marked = {f["buffer"] for step in self.steps.values() for f in step.findings if f["severity"] != "note"}
        for n, ribbon in enumerate(self.ribbons):
            for block, part in flow.parts(ribbon, self.blocks):
                paths = self._straight(n) if n in self.straight else self._paths(n, block, part)
                ends = tuple(dict.fromkeys([ribbon.source.row, *(row for row, _ in part.taps)]))
                strand = Strand(paths, ends, part.copies, ribbon.buffer, ribbon.bytes, ribbon.buffer in marked)
                found[block].strands.append(strand)
        return found

    def _box(self, row: int) -> Box:
        step = self.steps[row]
        top, bottom = self._edges(row)
        entering = self.inputs.get(row)
        leaving = [step.data["writes"][name] for name in returned(step)]
        middle = (top + bottom) / 2
        stub = Path(f"M4 {middle:.1f}H{LEFT}", self._width(sum(entering.values()))) if entering else None
        out = f"M{LEFT + 9} {bottom:.1f}C{LEFT + 9} {bottom + TURN:.1f} {LEFT} {bottom + 9:.1f} 8 {bottom + 9:.1f}"
        results = Path(out, self._width(sum(leaving))) if leaving else None
        return Box(row, step.kind, self.changes[row], round(top, 1), round(bottom - top, 1), stub, results)

    def _edges(self, row: int) -> tuple[float, float]:
        """The upper and lower edge of a row's box."""
        height = self.size.height(self.steps[row].data["est_us"])
        top = self.grid.tops[row] + (self.grid.heights[row] - height) / 2
        return top, top + height

    def _width(self, count: float) -> float:
        return round(self.size.width(count), 1)

    def _x(self, n: int) -> float:
        """The middle of a ribbon beside the boxes."""
        return LEFT + BOX + BESIDE + self.ribbons[n].track + self.size.width(self.ribbons[n].bytes) / 2

    def _straight(self, n: int) -> tuple[Path, ...]:
        ((target, count),) = self.ribbons[n].here.items()
        source = self.ribbons[n].source.row
        start, end = self._edges(source)[1], self._edges(target)[0]
        x0, x1 = self.leaving[n, source], self.entering[n, target]
        return (Path(_curve(x0, start, x1, end), self._width(count)),)

    def _paths(self, n: int, block: int, part: flow.Part) -> tuple[Path, ...]:
        ribbon, x = self.ribbons[n], self._x(n)
        if part.starts is None:
            trunk, y = f"M{x:.1f} 0", 0.0
        elif part.starts == ribbon.source.row:
            bottom = self._edges(part.starts)[1]
            y = bottom + TURN
            trunk = _curve(self.leaving[n, part.starts], bottom, x, y)
        else:
            y = self._edges(part.starts)[0] - TURN
            trunk = f"M{x:.1f} {y:.1f}"
        end = self.grid.blocks[block] if part.ends is None else self._edges(part.ends)[0] - TURN
        found = [Path(f"{trunk}V{max(end, y):.1f}", self._width(ribbon.bytes))]
        for row, count in part.taps:
            top = self._edges(row)[0]
            found.append(Path(_curve(x, top - TURN, self.entering[n, row], top), self._width(count)))
        return tuple(found)

    def _ports(self) -> tuple[dict[tuple[int, int], float], dict[tuple[int, int], float]]:
        """(ribbon, row) -> where along a box it leaves, and where it enters: in the order of the tracks."""
        leaving: dict[int, list[int]] = {}
        entering: dict[int, list[int]] = {}
        order = sorted(range(len(self.ribbons)), key=lambda n: (n not in self.straight, self.ribbons[n].track))
        for n in order:
            ribbon = self.ribbons[n]
            leaving.setdefault(ribbon.source.row, []).append(n)
            for row in dict.fromkeys([*ribbon.here, *ribbon.carried, *(place.row for place in ribbon.beyond)]):
                entering.setdefault(row, []).append(n)
        return self._along(leaving), self._along(entering)

    def _along(self, ends: Mapping[int, Sequence[int]]) -> dict[tuple[int, int], float]:
        found = {}
        for row, numbers in ends.items():
            widths = [self.size.width(self.ribbons[n].bytes) for n in numbers]
            free = BOX - 8 - sum(widths)
            gap = min(6.0, free / max(1, len(widths) - 1))  # below zero where they are too many: then they overlap
            x = LEFT + BOX / 2 - (sum(widths) + gap * (len(widths) - 1)) / 2
            for n, width in zip(numbers, widths, strict=True):
                found[n, row] = x + width / 2
                x += width + gap
        return found


def _curve(x0: float, y0: float, x1: float, y1: float) -> str:
    """Down from one point to another."""
    if abs(x0 - x1) < 0.05:
        return f"M{x0:.1f} {y0:.1f}V{y1:.1f}"
    bend = BEND * (y1 - y0)
    return f"M{x0:.1f} {y0:.1f}C{x0:.1f} {y0 + bend:.1f} {x1:.1f} {y1 - bend:.1f} {x1:.1f} {y1:.1f}"
