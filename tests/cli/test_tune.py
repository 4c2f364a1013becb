"""`normquant tune` where nothing is measured: what it refuses before the work, and how its tables are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from normquant.bench.timing import Timing
from normquant.cli.entry import main
from normquant.kernels.configs import Config
from normquant.kernels.product_configs import ProductConfig
from normquant.tune import launch_configs, product_tables, reader_configs, strategies

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


@pytest.fixture
def tables(tmp_path: Path, measured: list[Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Where `tune --linear` writes, and nothing that it launches."""

    def tuned(cases: list[Any], samples: int) -> Any:
        measured.append(cases)
        found = {1: {(4, ProductConfig()): Timing(4.0, 4.0, 4.0, samples)}}
        return iter([product_tables.choose(1536, 3072, found)])

    paths = {name: tmp_path / f"{name}.json" for name in ("splits", "products", "choices", "configs")}
    paths["splits"].write_text('{"7168x2112": 8}')
    paths["configs"].write_text('{"silu_mul_quant": {"2304": [{"up_to": 64, "num_warps": 8}]}}')
    monkeypatch.setattr(product_tables, "paths", lambda capability: tuple(paths.values())[:3])
    monkeypatch.setattr(launch_configs, "table_path", lambda capability: paths["configs"])
    monkeypatch.setattr(product_tables, "precompile", lambda cases, told: None)
    monkeypatch.setattr(product_tables, "tune", tuned)
    monkeypatch.setattr(reader_configs, "precompile", lambda cases, told: None)
    monkeypatch.setattr(reader_configs, "measure", lambda case, samples: {Config(2, 4): Timing(5.0, 5.0, 5.0, samples)})
    return paths


def entry(k: int, n: int) -> dict[str, Any]:
    return {"part": "product", "k": k, "n": n, "m": [1, 1], "us": {"normquant": 5.1, "scaled_mm": 7.8}}


def test_products_are_tuned_and_then_compared(
    tables: dict[str, Path], measured: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(product_tables, "compare", lambda *given: iter([entry(1536, 3072)]))
    before = tables["configs"].read_text()
    assert main(["tune", "--linear", "--k", "1536", "--m", "1"]) == 0
    assert [(c.k, c.m) for c in measured[0]] == [(1536, 1)]
    assert json.loads(tables["splits"].read_text()) == {"7168x2112": 8, "1536x3072": 4}
    assert json.loads(tables["products"].read_text()) == {"1536x3072": [{"up_to": 1}]}
    assert json.loads(tables["choices"].read_text())["entries"] == [entry(1536, 3072)]
    assert tables["configs"].read_text() == before  # rope_last has one config for all
    assert "product 1536x3072 m=1: normquant 5.1 us, scaled_mm 7.8 us" in capsys.readouterr().out


def test_the_ops_that_read_products_get_configs(tables: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_tables, "compare", lambda *given: iter([]))
    assert main(["tune", "--linear", "--k", "7168", "--m", "1,16"]) == 0
    found = json.loads(tables["configs"].read_text())
    own = [{"up_to": 16, "num_warps": 2, "split": 4}]
    assert found["silu_mul_quant of parts"] == {"2304": own} and found["latent_norm_quant of parts"] == {"1536": own}
    assert found["silu_mul_quant"] == {"2304": [{"up_to": 64, "num_warps": 8}]}


def test_a_product_that_was_compared_stays_when_the_rest_is_not(
    tables: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def compared(*given: Any) -> Any:
        yield entry(1536, 3072)
        yield entry(7168, 2112)
        raise KeyboardInterrupt

    monkeypatch.setattr(product_tables, "compare", compared)
    assert main(["tune", "--linear", "--m", "1"]) == 130
    assert json.loads(tables["choices"].read_text())["entries"] == [entry(1536, 3072)]


@pytest.mark.parametrize("more", [["--l2"], ["--ops", "group_quant"], ["--output", "table.json"]])
def test_what_products_do_not_take(more: list[str], measured: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--linear", *more]) == 2
    assert "it takes no --ops, --l2 or --output" in capsys.readouterr().err and measured == []
