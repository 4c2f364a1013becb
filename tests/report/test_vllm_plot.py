"""vLLM's decode steps by class of kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from normquant.bench.record_files import read
from normquant.report import vllm_plot

BASELINES = Path(__file__).parents[2] / "baselines"


def record(setting: str, batch: int, **classes: float) -> dict[str, Any]:
    return {
        "suite": "vllm", "setting": setting, "linear": "deepgemm", "layers": 4, "moe": False, "batch": batch,
        "classes": classes, "gpu_us_per_step": sum(classes.values()), "vllm": "1",
    }  # fmt: skip


def test_classes_are_drawn_in_groups_and_none_is_lost() -> None:
    groups = vllm_plot.grouped(record("off", 1, gemm=5.0, norm=1.0, quant=2.0, rope=0.5, something_new=0.25))
    assert groups["matrix products"] == 5.0 and groups["norm, quantization, gated product"] == 3.0
    assert groups["attention, rotary embedding"] == 0.5 and groups["other"] == 0.25
    for path in BASELINES.glob("h*.jsonl"):
        for r in read(path):
            if r["suite"] == "vllm":
                assert sum(vllm_plot.grouped(r).values()) == pytest.approx(sum(r["classes"].values()))


def test_bars_are_in_order_and_the_later_measurement_holds() -> None:
    first = record("normquant", 1, gemm=9.0)
    records = [first, record("off", 16, gemm=4.0), record("default", 1, gemm=8.0), record("normquant", 1, gemm=6.0)]
    ((model, held),) = vllm_plot.models(records).items()
    assert model == ("deepgemm", 4, False, True)
    assert [(r["batch"], r["setting"]) for r in held] == [(1, "default"), (1, "normquant"), (16, "off")]
    assert [vllm_plot.change(r, held) for r in held] == ["", "-25.0 %", ""]


def test_every_bar_is_as_long_as_its_step() -> None:
    pytest.importorskip("matplotlib")
    records = list(read(BASELINES / "h200-vllm-0.26.jsonl"))
    drawing = vllm_plot.figure(records)
    records = [r for r in records if r["tensor_parallel"] == 1]
    bars = [bar for axes in drawing.axes for bar in axes.patches]
    ends: dict[tuple[int, float], float] = {}
    for number, axes in enumerate(drawing.axes):
        for bar in axes.patches:
            key = number, round(bar.get_y(), 3)
            ends[key] = max(ends.get(key, 0.0), bar.get_x() + bar.get_width())
    assert len(bars) > len(ends) == len(records)
    assert sorted(ends.values()) == pytest.approx(sorted(sum(r["classes"].values()) for r in records))


def test_a_setting_that_has_no_bar_is_left_out() -> None:
    records = [record("off", 1, gemm=4.0), record("installed-normquant", 1, gemm=3.0) | {"products": "always"}]
    (held,) = vllm_plot.models(records).values()
    assert [r["setting"] for r in held] == ["off"]
