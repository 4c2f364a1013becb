"""Several ranks, measured and modelled."""

from __future__ import annotations

from pathlib import Path

import pytest

from normquant.bench.record_files import read
from normquant.report import ranks_plot

RECORDS = list(read(Path(__file__).parents[2] / "baselines" / "h200.jsonl"))


def test_measurements_are_sorted_by_ranks() -> None:
    found = ranks_plot.measured(RECORDS, "normquant", 7168)
    assert list(found) == list(ranks_plot.ROWS)
    assert [n for n, _ in found[64]] == [2, 4, 8]
    assert [n for n, _ in ranks_plot.measured(RECORDS, "normquant", 4096)[64]] == [2, 4]
    with pytest.raises(ValueError, match="no records of someone"):
        ranks_plot.measured(RECORDS, "someone", 7168)


@pytest.mark.parametrize("k", [2048, 7168])
def test_the_model_is_drawn_for_all_ranks_and_the_points_where_they_were_measured(k: int) -> None:
    pytest.importorskip("matplotlib")
    drawing = ranks_plot.figure(RECORDS, lambda n, m, sharded: n + m + 1000 * sharded, k)
    for axes, sharded in zip(drawing.axes, (False, True), strict=True):
        lines, dots = axes.lines[::2], axes.lines[1::2]
        for m, line in zip(ranks_plot.ROWS, lines, strict=True):
            assert list(line.get_ydata()) == [n + m + 1000 * sharded for n in ranks_plot.RANKS]
        points = ranks_plot.measured(RECORDS, "normquant sharded" if sharded else "normquant", k)
        assert axes.get_title(loc="left").endswith(f", K = {k}")
        assert [list(dot.get_ydata()) for dot in dots] == [[us for _, us in points[m]] for m in ranks_plot.ROWS]
