"""`normquant tune` where nothing is measured: what it refuses before the work, and how its tables are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from normquant.cli.entry import main
from normquant.tune import launch_configs, strategies

ENTRY = {"op": "rms_norm_quant", "k": 512, "m": [1, 16], "us": {"stock": 9.0, "fused": 5.0}}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A GPU that measures nothing; gives what was asked for."""
    asked: list[Any] = []

    def measure(cases: list[Any], samples: int, in_l2: bool) -> list[dict[str, Any]]:
        asked.append(cases)
        return [ENTRY | {"k": cases[0].k}]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(launch_configs, "precompile", lambda *given: asked.append(given))
    monkeypatch.setattr(strategies, "measure", measure)
    return asked


@pytest.mark.parametrize("what", [[], ["--strategies"], ["--clusters"]])
@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_broken_table_is_refused_before_the_work(
    tmp_path: Path, measured: list[Any], capsys: pytest.CaptureFixture[str], what: list[str], text: str
) -> None:
    path = tmp_path / "sm90.json"
    path.write_text(text)
    assert main(["tune", "--ops", "rms_norm_quant", "--k", "512", "--output", str(path), *what]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"normquant: error: {path} is no table")
    assert measured == [] and path.read_text() == text


def test_a_path_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, measured: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", "--ops", "rms_norm_quant", "--k", "512", "--output", str(tmp_path)]) == 2
    assert "is a directory" in capsys.readouterr().err and measured == []


def test_strategies_that_were_not_measured_keep_their_entries(tmp_path: Path, measured: list[Any]) -> None:
    path, k = tmp_path / "sm90.json", ["--k", "512"]
    assert main(["tune", "--strategies", "--ops", "rms_norm_quant", *k, "--output", str(path)]) == 0
    table = json.loads(path.read_text())
    table["entries"][0]["k"] = 640
    path.write_text(json.dumps(table))
    assert main(["tune", "--strategies", "--ops", "rms_norm_quant", *k, "--output", str(path)]) == 0
    assert sorted({e["k"] for e in json.loads(path.read_text())["entries"]}) == [512, 640]
    assert [p.name for p in tmp_path.iterdir()] == ["sm90.json"] and measured


def test_a_table_names_every_torch_that_its_entries_are_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, now = tmp_path / "sm90.json", torch.__version__
    strategies.write(path, (9, 0), "a command", [ENTRY])
    assert json.loads(path.read_text())["torch"] == now
    monkeypatch.setattr(torch, "__version__", "9.0.0")
    strategies.write(path, (9, 0), "a command", [ENTRY | {"k": 640}])
    assert json.loads(path.read_text())["torch"] == f"{now}, 9.0.0"
    strategies.write(path, (9, 0), "a command", [ENTRY, ENTRY | {"k": 640}])
    assert json.loads(path.read_text())["torch"] == "9.0.0"
    path.write_text(json.dumps({"capability": "9.0", "entries": [ENTRY]}))
    strategies.write(path, (9, 0), "a command", [ENTRY | {"k": 640}])
    assert json.loads(path.read_text())["torch"] == "9.0.0, unknown"


def test_products_are_tuned_and_then_compared(
    tmp_path: Path, measured: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from normquant.bench.timing import Timing
    from normquant.kernels.product_configs import ProductConfig
    from normquant.tune import product_tables

    def found(cases: list[Any], samples: int) -> Any:
        measured.append(cases)
        return iter([product_tables.choose(1536, 3072, {1: {(4, ProductConfig()): Timing(4.0, 4.0, 4.0, samples)}})])

    entry = {"part": "product", "k": 1536, "n": 3072, "m": [1, 1], "us": {"normquant": 5.1, "scaled_mm": 7.8}}
    paths = tuple(tmp_path / name for name in ("splits.json", "configs.json", "choices.json"))
    paths[0].write_text('{"7168x2112": 8}')
    monkeypatch.setattr(product_tables, "paths", lambda capability: paths)
    monkeypatch.setattr(product_tables, "precompile", lambda cases, told: None)
    monkeypatch.setattr(product_tables, "tune", found)
    monkeypatch.setattr(product_tables, "compare", lambda *given: iter([entry]))
    assert main(["tune", "--linear", "--k", "1536", "--m", "1"]) == 0
    assert [(c.k, c.m) for c in measured[0]] == [(1536, 1)]
    assert json.loads(paths[0].read_text()) == {"7168x2112": 8, "1536x3072": 4}
    assert json.loads(paths[1].read_text()) == {"1536x3072": [{"up_to": 1}]}
    assert json.loads(paths[2].read_text())["entries"] == [entry]
    assert "product 1536x3072 m=1: normquant 5.1 us, scaled_mm 7.8 us" in capsys.readouterr().out


@pytest.mark.parametrize("more", [["--l2"], ["--ops", "group_quant"], ["--output", "table.json"]])
def test_what_products_do_not_take(more: list[str], measured: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--linear", *more]) == 2
    assert "it takes no --ops, --l2 or --output" in capsys.readouterr().err and measured == []
