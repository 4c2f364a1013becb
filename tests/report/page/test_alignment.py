"""Two timelines side by side."""

from __future__ import annotations

from typing import Any

from shared.generated_code import OFF, ON
from shared.many_layers import repeated

from normquant.audit import audit_path
from normquant.report.page import alignment
from normquant.report.page.alignment import CHANGED, GONE, NEW, SAME
from normquant.report.page.timeline import Timeline, timeline


def layer(path: Any) -> dict[str, Any]:
    return audit_path(path, rows=(64,))[0].to_dict()


def names(row: alignment.Row, sides: list[Timeline]) -> tuple[str, ...]:
    found = zip(row.steps, sides, strict=True)
    return tuple("" if n is None else side.steps[n].data["name"].rpartition(".")[2] for n, side in found)


def test_every_launch_stands_in_one_row_and_in_order() -> None:
    sides = [timeline(layer(OFF)), timeline(layer(ON))]
    rows = alignment.rows(sides)
    for number, side in enumerate(sides):
        assert [row.steps[number] for row in rows if row.steps[number] is not None] == list(range(len(side.steps)))


def test_products_stand_beside_each_other_and_what_the_fusion_replaced_beside_what_it_made() -> None:
    sides = [timeline(layer(OFF)), timeline(layer(ON))]
    found = [(names(row, sides), row.changes) for row in alignment.rows(sides)]
    assert [both for both, _ in found if "fp8_gemm_nt_op" in both] == [("fp8_gemm_nt_op", "fp8_gemm_nt_op")] * 5
    assert [both[1] for both, changes in found if both[1] == "rms_norm_per_block_quant" and changes[1] == NEW] == [
        "rms_norm_per_block_quant"
    ] * 3
    assert sum(both[0] == "per_token_group_fp8_quant" and changes[0] == GONE for both, changes in found) == 3


def test_a_launch_that_moves_other_bytes_is_marked() -> None:
    before, after = layer(ON), layer(ON)
    after["programs"][0]["launches"][13]["bytes_read"] += 1
    rows = alignment.rows([timeline(before), timeline(after)])
    assert [row.changes for row in rows] == [(SAME, SAME)] * 13 + [(CHANGED, CHANGED)]


def test_every_layer_is_aligned_in_the_same_way() -> None:
    one = alignment.rows([timeline(layer(OFF)), timeline(layer(ON))])
    sides = [timeline(repeated(layer(path), 7)) for path in (OFF, ON)]
    many = alignment.rows(sides)
    assert [row.changes for row in many[1:-1]] == [row.changes for row in one] * 7


def test_one_side_has_nothing_to_compare() -> None:
    rows = alignment.rows([timeline(layer(ON))])
    assert [row.steps for row in rows] == [(n,) for n in range(14)] and {row.changes for row in rows} == {(SAME,)}
