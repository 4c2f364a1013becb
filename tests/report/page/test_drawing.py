"""Boxes as high as their time, ribbons as wide as the root of their bytes, and nothing that covers another."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from shared.generated_code import OFF, ON, SEEDS
from shared.many_layers import repeated

from normquant.audit import audit_path
from normquant.report.page import alignment, drawing, folding
from normquant.report.page.drawing import AROUND, BOX, LEFT, WIDEST, Scaling, SideDrawing
from normquant.report.page.timeline import timeline


def draw(*reports: dict[str, Any]) -> tuple[list[SideDrawing], drawing.Grid, Scaling]:
    sides = [timeline(report) for report in reports]
    rows = alignment.rows(sides)
    blocks = folding.blocks(rows, sides)
    size = drawing.scale(sides)
    grid = drawing.grid(rows, blocks, sides, size)
    return [SideDrawing(side, rows, blocks, n, size, grid) for n, side in enumerate(sides)], grid, size


def report(path: Path) -> dict[str, Any]:
    return audit_path(path, rows=(64,) if path in (ON, OFF) else ())[0].to_dict()


def test_sizes() -> None:
    size = Scaling(10.0, WIDEST / (16 << 20) ** 0.5)
    assert size.height(4.0) == 40.0 and size.height(0.01) == drawing.LOWEST
    assert size.width(16 << 20) == WIDEST and size.width(4 << 20) == WIDEST / 2 and size.width(1) == drawing.NARROWEST
    assert size.width(14 << 20) > 20 * size.width(14 << 10), "a weight is not as thin as a scale"


def test_boxes_are_as_high_as_their_time_and_alike_on_both_sides() -> None:
    drawn, _, size = draw(report(OFF), report(ON))
    for side in drawn:
        for panel in side.panels():
            for box in panel.boxes:
                assert box.height == pytest.approx(size.height(side.steps[box.row].data["est_us"]), abs=0.06)
    longest = max(step.data["est_us"] for side in drawn for step in side.steps.values())
    assert size.height(longest) <= drawing.TALLEST


@pytest.mark.parametrize("path", [ON, OFF, *sorted(SEEDS.glob("*.py"))], ids=lambda path: path.stem)
def test_boxes_lie_in_their_rows_with_room_for_ribbons(path: Path) -> None:
    (side,), grid, _ = draw(report(path))
    rows = sorted(side.steps)
    for upper, lower in pairwise(rows):
        end = grid.tops[upper] + grid.heights[upper]
        assert side.block_of[upper] != side.block_of[lower] or end <= grid.tops[lower]
    for panel in side.panels():
        for box in panel.boxes:
            assert grid.tops[box.row] + AROUND <= box.y + 0.1
            assert box.y + box.height + AROUND <= grid.tops[box.row] + grid.heights[box.row] + 0.1


@pytest.mark.parametrize("count", [1, 32])
def test_ribbons_touch_their_boxes_and_stay_in_the_drawing(count: int) -> None:
    (side,), grid, _ = draw(repeated(report(ON), count))
    for number, panel in enumerate(side.panels()):
        edges = {y for box in panel.boxes for y in (box.y, round(box.y + box.height, 1))} | {0.0, grid.blocks[number]}
        for strand in panel.strands:
            for path in strand.paths:
                numbers = [float(x) for x in re.findall(r"-?\d+\.?\d*", path.d)]
                assert all(0 <= x <= side.width for x in numbers[:-1:2] if "V" not in path.d)
                assert all(-0.1 <= y <= grid.blocks[number] + 0.1 for y in (numbers[1], numbers[-1]))
            starts = {float(re.findall(r"-?\d+\.?\d*", path.d)[1]) for path in strand.paths}
            assert strand.copies or min(abs(a - b) for a in starts for b in edges) < 0.2
    assert side.width >= LEFT + BOX


def test_every_launch_has_a_box_and_every_row_a_change() -> None:
    drawn, grid, _ = draw(repeated(report(OFF), 9), repeated(report(ON), 9))
    for side in drawn:
        boxes = [box for panel in side.panels() for box in panel.boxes]
        assert sorted(box.row for box in boxes) == sorted(side.steps) and len(grid.tops) >= len(side.steps)
        assert all(box.change == side.changes[box.row] for box in boxes)


def test_a_buffer_of_a_finding_is_marked() -> None:
    (side,), _, _ = draw(report(ON))
    marked = {strand.buffer for panel in side.panels() for strand in panel.strands if strand.marked}
    assert marked <= {f["buffer"] for step in side.steps.values() for f in step.findings if f["severity"] != "note"}
    assert marked
