"""Repeated layers as one block."""

from __future__ import annotations

from typing import Any

import pytest
from shared.generated_code import OFF, ON
from shared.many_layers import repeated

from normquant.audit import audit_path
from normquant.report.page import alignment, folding
from normquant.report.page.folding import Block
from normquant.report.page.timeline import timeline


def fold(*reports: dict[str, Any]) -> list[Block]:
    sides = [timeline(report) for report in reports]
    return folding.blocks(alignment.rows(sides), sides)


def layer(path: Any = ON) -> dict[str, Any]:
    return audit_path(path, rows=(64,))[0].to_dict()


def test_one_layer_is_one_block() -> None:
    assert fold(layer()) == [Block(0, 14)]


@pytest.mark.parametrize("count", [3, 32, 61])
def test_layers_that_are_alike_are_drawn_once(count: int) -> None:
    assert fold(repeated(layer(), count)) == [Block(0, 1), Block(1, 14, count), Block(1 + 14 * count, 1)]


def test_two_are_not_folded() -> None:
    assert [block.count for block in fold(repeated(layer(), 2))] == [1]


def test_both_sides_are_folded_together() -> None:
    before, after = repeated(layer(OFF), 32), repeated(layer(ON), 32)
    blocks = fold(before, after)
    assert [block.count for block in blocks] == [1, 32, 1]
    assert blocks[-1].end == len(alignment.rows([timeline(before), timeline(after)]))


def test_a_layer_that_differs_stands_alone() -> None:
    report = repeated(layer(), 9)
    report["programs"][0]["launches"][1 + 14 * 4 + 2]["bytes_read"] += 1
    blocks = fold(report)
    assert [block.count for block in blocks] == [1, 4, 1, 4, 1] and blocks[2].length == 14


def test_layers_of_two_kinds_that_alternate_are_folded_in_pairs() -> None:
    report = repeated(layer(), 12)
    for number in range(0, 12, 2):
        report["programs"][0]["launches"][1 + 14 * number]["name"] = "another_kernel"
    assert [(block.length, block.count) for block in fold(report)] == [(1, 1), (28, 6), (1, 1)]


def test_one_kernel_for_several_tensors_is_no_layer() -> None:
    report = repeated(layer(), 1)
    program = report["programs"][0]
    program["launches"] = [{**program["launches"][5], "position": n} for n in range(6)]
    program["edges"], report["findings"] = [], []
    assert [block.count for block in fold(report)] == [1]


def test_a_block_begins_where_a_program_does() -> None:
    report = layer()
    program = report["programs"][0]
    report["programs"] = [{**program, "number": n, "name": f"piece {n}"} for n in range(5)]
    report["findings"] = []
    assert fold(report) == [Block(0, 14, 5)]
