"""`normquant vllm-report`: what it says about the records that the plugin wrote."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from normquant.cli.entry import main
from normquant.cli.vllm_report import default_root
from normquant.compile.fusion_report import FusionReport, Site
from normquant.vllm.graph_records import FILE, SELF_QUANTIZING, GraphRecord, append, read

ADD = Site("layers.3.input_layernorm", "m.py:1", "fused", "policy auto", "add_rms_norm_quant", "e4m3", "s0", 7168)
NEXT = Site("layers.12.input_layernorm", "m.py:1", "fused", "policy auto", "add_rms_norm_quant", "e4m3", "s0", 7168)
LEFT = Site("layers.3.mlp.down_proj.quant_fp8", "m.py:2", "stock", "its input is aten.mul, not an RMSNorm")


def record(*sites: Site, linear: dict[str, int] | None = None, error: str = "", graph: int = 1) -> GraphRecord:
    report = FusionReport(graph, "auto", sites, (LEFT,), error=error).to_dict()
    return GraphRecord("0.1.0", "0.32.0", "(1, 8)", json.loads(json.dumps(report)), linear or {})


def written(folder: Path, *records: GraphRecord) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for entry in records:
        append(folder, entry)
    return folder


def test_layers_of_one_type_are_one_line(tmp_path: Path, capsys: Any) -> None:
    records = (record(ADD, linear={"DeepGEMM": 5}), record(NEXT, linear={"DeepGEMM": 4}))
    assert main(["vllm-report", str(written(tmp_path / "rank_0_0", *records))]) == 0
    out = capsys.readouterr().out
    assert "2 of 2 sites fused in 2 compiled graphs" in out
    lines = [line.strip() for line in out.splitlines()]
    (at,) = [number for number, line in enumerate(lines) if "input_layernorm" in line]
    assert "layers.*.input_layernorm K=7168" in lines[at] and "(layer 3, 12)" in lines[at]
    assert "add_rms_norm_quant" in lines[at + 1] and lines[at + 2] == "policy auto"
    at = lines.index("stock  layers.*.mlp.down_proj.quant_fp8 (layer 3)")
    assert lines[at + 1] == "its input is aten.mul, not an RMSNorm"
    assert "linear kernel: DeepGEMM, 9 calls" in out
    assert "normquant 0.1.0, vLLM 0.32.0, policy auto" in out


def test_what_stood_in_the_way_is_said(tmp_path: Path, capsys: Any) -> None:
    written(tmp_path, record(linear={"FlashInfer": 3}), record(error="RuntimeError: planted"))
    assert main(["vllm-report", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"FlashInfer, 3 calls; {SELF_QUANTIZING}" in out and "nothing is fused in front of it" in SELF_QUANTIZING
    assert "compiled as it was: RuntimeError: planted" in out


def test_a_graph_compiled_again_counts_once(tmp_path: Path) -> None:
    written(tmp_path, record(ADD, graph=1), record(ADD, graph=7), record(NEXT, graph=8))
    assert len(list(read(tmp_path / FILE))) == 2


def test_the_cache_written_last_is_shown(tmp_path: Path, capsys: Any) -> None:
    for age, (name, site) in enumerate((("new", ADD), ("old", NEXT))):
        os.utime(written(tmp_path / name, record(site)) / FILE, (1e9 - age, 1e9 - age))
    main(["vllm-report", str(tmp_path)])
    assert str(tmp_path / "new") in (out := capsys.readouterr().out) and str(tmp_path / "old") not in out
    main(["vllm-report", "--all", "--json", str(tmp_path)])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(line["path"]).parent.name for line in lines] == ["new", "old"]
    assert asdict(record(ADD)).items() <= lines[0].items()


def test_ranks_that_did_the_same_are_told_of_once(tmp_path: Path, capsys: Any) -> None:
    for rank in range(3):
        written(tmp_path / f"rank_{rank}_0", record(ADD))
    written(tmp_path / "other", record(NEXT))
    main(["vllm-report", "--all", str(tmp_path)])
    out = capsys.readouterr().out
    assert out.count("1 of 1 sites fused") == 2
    first = out.index(str(tmp_path / "rank_0_0"))
    assert out[first:].splitlines()[:3] == [str(tmp_path / f"rank_{rank}_0") for rank in range(3)]


def test_a_terminal_is_not_overrun(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    written(tmp_path, record(replace(ADD, reason="measured: " + ", ".join(f"provider {n} us" for n in range(30)))))
    main(["vllm-report", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    sites = lines[lines.index(next(line for line in lines if "sites fused" in line)) + 1 : -1]
    assert len(sites) > 8 and max(map(len, sites)) <= 60


@pytest.mark.parametrize("content", [None, "{}\n", "no json\n", "[1]\n"])
def test_a_path_without_records_is_an_error(tmp_path: Path, capsys: Any, content: str | None) -> None:
    if content is not None:
        (tmp_path / FILE).write_text(content)
    assert main(["vllm-report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert ("is no record of a graph" in error) if content else ("with normquant switched on" in error)
    assert main(["vllm-report", str(tmp_path / "missing")]) == 2


def with_sites(*sites: Any) -> str:
    report = {"policy": "auto", "sites": sites, "others": [], "error": ""}
    return json.dumps({"normquant": "0", "vllm": "0", "rows": "", "report": report}) + "\n"


BROKEN = [with_sites({}), with_sites(3), with_sites({"fused": True, "op": "x"}), '{"report": []}\n', "\udcff\n"]


@pytest.mark.parametrize("content", BROKEN)
def test_records_that_lack_something_are_one_sentence(tmp_path: Path, capsys: Any, content: str) -> None:
    (tmp_path / FILE).write_text(content, errors="surrogateescape")
    assert main(["vllm-report", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and err.startswith(f"normquant: error: {tmp_path / FILE}")


def test_where_vllm_keeps_its_caches() -> None:
    assert default_root({"VLLM_CACHE_ROOT": "/a"}) == Path("/a/torch_compile_cache")
    assert default_root({"XDG_CACHE_HOME": "/b"}) == Path("/b/vllm/torch_compile_cache")
    assert default_root({}) == Path.home() / ".cache/vllm/torch_compile_cache"


def test_a_user_without_a_home_is_asked_for_a_path(capsys: Any) -> None:
    with mock.patch.object(Path, "home", side_effect=RuntimeError("Could not determine home directory.")):
        assert default_root({"VLLM_CACHE_ROOT": "/a"}) == Path("/a/torch_compile_cache")
        with mock.patch.dict(os.environ, clear=True):
            assert main(["vllm-report"]) == 2
    assert capsys.readouterr().err.startswith("normquant: error: this user has no home directory")
