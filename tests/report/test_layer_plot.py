"""Decoder layers relative to the stock compile."""

from __future__ import annotations

from typing import Any

import pytest

from normquant.report import layer_plot


def record(setting: str, m: int, us: float, model: str = "a") -> dict[str, Any]:
    return {"suite": "layer", "model": model, "setting": setting, "m": m, "us": us}


def test_times_are_relative_to_the_stock_compile() -> None:
    records = [record("stock", 64, 10.0), record("normquant", 64, 9.0), record("normquant", 1, 2.0)]
    records += [record("stock", 1, 4.0), record("normquant", 1, 3.0, "b"), {"suite": "kernels"}]
    assert layer_plot.series(records) == {"a": [(1, 0.5), (64, 0.9)]}
    with pytest.raises(ValueError, match="both settings"):
        layer_plot.series(records[:1])
