"""Where the boxes and edges of a data-flow go."""

from __future__ import annotations

from shared.generated_code import ON, SEEDS

from normquant.audit import audit_path
from normquant.report import dataflow


def test_boxes_do_not_overlap_and_edges_go_down() -> None:
    for path in [ON, *sorted(SEEDS.glob("*.py"))]:
        for program in audit_path(path)[0].to_dict()["programs"]:
            placed = dataflow.layout(program["launches"], program["edges"])
            boxes = list(placed.boxes.values())
            for i, (x, y) in enumerate(boxes):
                assert dataflow.BOX_WIDTH / 2 <= x <= placed.width - dataflow.BOX_WIDTH / 2 and 0 < y < placed.height
                for other_x, other_y in boxes[i + 1 :]:
                    assert y != other_y or abs(x - other_x) >= dataflow.BOX_WIDTH
            assert all(placed.boxes[line.source][1] < placed.boxes[line.target][1] for line in placed.lines)
