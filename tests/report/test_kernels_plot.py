"""The drawing of kernels' times: what it shows, and that the README's is the one of the committed records."""

from itertools import pairwise
from pathlib import Path

import pytest

from normquant.bench.record_files import read
from normquant.cli.entry import main
from normquant.report import kernels_plot

pytest.importorskip("matplotlib", reason="matplotlib is not installed; it comes with normquant[report]")
ROOT = Path(__file__).parents[2]
BASELINES = ROOT / "baselines" / "h100.jsonl"


def record(provider: str, m: int, us: float, normed: bool = False) -> dict:
    kernel = {"suite": "kernels", "op": "add_rms_norm_quant", "k": 7168, "inputs": "dram"}
    return kernel | {"provider": provider, "m": m, "us": us, "normed": normed}


def test_times_are_in_times_of_ours():
    records = [record("normquant", 1, 2.0), record("vllm fused", 1, 6.0), record("normquant", 16, 4.0)]
    records += [record("torch copy_", 1, 3.0), record("triton copy", 1, 1.0), record("torch eager", 1, 60.0)]
    records += [record("vllm fused", 64, 9.0), record("vllm fused", 1, 9.0, normed=True)]
    found = kernels_plot.series(records, "add_rms_norm_quant", 7168, normed=False)
    assert found == {"vllm fused": [(1, 3.0)], "copy": [(1, 0.5)]}  # the better copy, and no rows without ours


def test_every_line_is_drawn_and_named():
    drawing = kernels_plot.figure(list(read(BASELINES)), "add_rms_norm_quant", 7168)
    plain, normed = drawing.axes
    labels = {text.get_text() for axes in drawing.axes for text in axes.texts}
    assert labels == {"normquant", *(label for label, _ in kernels_plot.SHOWN.values())}
    assert [len(axes.lines) for axes in (plain, normed)] == [5, 5]  # ours, a copy, and three others
    assert all(len(line.get_xdata()) == 15 for axes in drawing.axes for line in axes.lines[1:])


def test_names_do_not_cover_each_other():
    for axes in kernels_plot.figure(list(read(BASELINES)), "add_rms_norm_quant", 7168).axes:
        heights = sorted(text.get_position()[1] for text in axes.texts)
        assert all(b - a >= 0.99 * kernels_plot.GAP for a, b in pairwise(heights))


def test_records_without_the_op_are_refused(tmp_path, capsys):
    assert main(["plot", str(BASELINES), "--k", "640", "--output", str(tmp_path / "x.svg")]) == 2
    assert "no records of add_rms_norm_quant with K=640" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["{", '{"suite": "kernels", "op": "add_rms_norm_quant", "k": 7168}', '{"suite": 1}'])
def test_a_broken_file_is_one_sentence(tmp_path, capsys, line):
    (tmp_path / "x.jsonl").write_text(line + "\n")
    (tmp_path / "x.svg").write_text("old")
    assert main(["plot", str(tmp_path / "x.jsonl"), "--output", str(tmp_path / "x.svg")]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"normquant: error: {tmp_path / 'x.jsonl'}:1: not ")
    assert (tmp_path / "x.svg").read_text() == "old"
