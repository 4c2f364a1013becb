"""Audits read back from their JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from shared.generated_code import OFF, ON, SEEDS

from normquant.audit import audit_path, expectations, stored
from normquant.audit.source.code_files import Unusable


def write(path: Path, data: Any) -> str:
    path.write_text(json.dumps(data), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("code", [ON, OFF, *sorted(SEEDS.glob("*.py"))], ids=lambda path: path.stem)
def test_what_was_stored_is_what_is_read(code: Path, tmp_path: Path) -> None:
    (report,) = audit_path(code)
    path = write(tmp_path / "report.json", report.to_dict())
    assert stored.is_stored(path)
    (found,) = stored.read(path)
    assert found.to_dict() == report.to_dict()
    assert [(f.rule, f.program, f.position) for f in found.findings] == [
        (f.rule, f.program, f.position) for f in report.findings
    ]
    for name in ("bytes", "wasted_bytes", "externs", "est_us", "skipped"):
        assert getattr(found, name) == getattr(report, name), name
    assert found.to_sizes() == report.to_sizes()
    assert [kernel.name for kernel in found.kernels] == [kernel.name for kernel in report.kernels]
    wanted = {launch.name: 0 for launch in report.launches}
    rules = [finding.rule for finding in report.findings]
    assert expectations.broken([found], rules, wanted, 0) == expectations.broken([report], rules, wanted, 0)


def test_several_sizes(tmp_path: Path) -> None:
    reports = audit_path(ON, rows=(1, 64))
    path = write(tmp_path / "report.json", [report.to_dict() for report in reports])
    assert [report.to_sizes() for report in stored.read(path)] == [{"s72": 1}, {"s72": 64}]


def test_a_report_of_this_machine_s_gpu_is_read_without_it(tmp_path: Path) -> None:
    data = audit_path(ON)[0].to_dict() | {"target": "here"}
    assert stored.read(write(tmp_path / "report.json", data))[0].target.name == "here"


def test_a_report_of_an_earlier_version_has_no_source_lines(tmp_path: Path) -> None:
    data = audit_path(ON)[0].to_dict()
    for launch in data["programs"][0]["launches"]:
        del launch["code"]
    assert {launch.code for launch in stored.read(write(tmp_path / "report.json", data))[0].launches} == {""}


@pytest.mark.parametrize("data", [{}, [], [1], 3, {"model_type": "llama"}, "text"])
def test_other_json_is_none(data: Any, tmp_path: Path) -> None:
    assert not stored.is_stored(write(tmp_path / "x.json", data))


@pytest.mark.parametrize("content", [b"", b"\xff{", b"{", b"import torch", b"[" * 100_000])
def test_other_files_are_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(content)
    assert not stored.is_stored(str(tmp_path / "x.json"))
    assert not stored.is_stored(str(tmp_path / "nowhere"))


PATHS = [
    ("target",), ("programs",), ("findings",), ("bytes",), ("notes",), ("skipped",), ("sizes",), ("est_us",),
    ("extern",),
    ("programs", 0, "launches"), ("programs", 0, "edges"), ("programs", 0, "buffers"), ("programs", 0, "outputs"),
    ("programs", 0, "launches", 3, "reads"), ("programs", 0, "launches", 3, "kind"),
    ("programs", 0, "launches", 3, "est_us"), ("programs", 0, "edges", 0, "from"), ("findings", 0, "position"),
    ("findings", 0, "origins"), ("findings", 0, "rule"),
]  # fmt: skip


def _parent(data: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        data = data[key]
    return data


@pytest.mark.parametrize("path", PATHS, ids=lambda path: "-".join(map(str, path)))
def test_a_part_that_is_missing_or_of_another_kind_is_refused(path: tuple[Any, ...], tmp_path: Path) -> None:
    for damage in ("missing", "other"):
        data = audit_path(ON)[0].to_dict()
        if damage == "missing":
            del _parent(data, path)[path[-1]]
        else:
            _parent(data, path)[path[-1]] = object.__name__ if path[-1] in ("from", "position", "est_us") else 3
        file = write(tmp_path / f"{damage}.json", data)
        if damage == "other" and path[-1] in ("target", "rule", "bytes", "est_us") and len(path) < 4:
            continue  # a plain value, used as it is
        with pytest.raises(Unusable, match="not a whole audit"):
            stored.read(file)


def test_an_edge_or_a_finding_of_a_launch_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for change in ({"to": 99}, {"from": 99}, {"to": -1}, {"from": -1}, {"to": None}, {"bytes": "many"}):
        data = audit_path(ON)[0].to_dict()
        data["programs"][0]["edges"][0].update(change)
        with pytest.raises(Unusable, match="not a whole audit"):
            stored.read(write(tmp_path / "x.json", data))
    for change in ({"position": 99}, {"position": -1}, {"program": 7}, {"program": -1}):
        data = audit_path(ON)[0].to_dict()
        data["findings"][0].update(change)
        with pytest.raises(Unusable, match="not a whole audit"):
            stored.read(write(tmp_path / "x.json", data))
