"""An audit as text and as annotations; numbers and tables in it."""

from __future__ import annotations

from typing import Any

import pytest
from shared.generated_code import ON

from normquant.audit import audit_path
from normquant.report import audit_text, formatting
from normquant.report.formatting import shorten, table


@pytest.fixture
def report() -> dict[str, Any]:
    return audit_path(ON, rows=(64,))[0].to_dict()


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (28672, "28.0 KiB"),
        (1835008, "1.75 MiB"),
        (-2097152, "-2.00 MiB"),
    ],
)
def test_sizes(count: int, text: str) -> None:
    assert formatting.size(count) == text


def test_other_units() -> None:
    assert (formatting.microseconds(0.94), formatting.microseconds(74.07), formatting.microseconds(1687.2)) == (
        "0.9",
        "74.1",
        "1687",
    )
    assert formatting.share(0.0183) == "1.8 %"
    assert (formatting.count(1, "kernel"), formatting.count(1200, "kernel")) == ("1 kernel", "1 200 kernels")


def test_columns_line_up() -> None:
    lines = table(["name", "bytes"], [["a", "1"], ["long name", "1000"]], "<>").splitlines()
    assert lines == ["name       bytes", "---------  -----", "a              1", "long name   1000"]
    assert table(["name"], [], "<") == ""


def test_long_names_keep_their_ends() -> None:
    assert shorten("triton_poi_fused_add_mul_view_12", 16) == "triton_...iew_12"
    assert len(shorten("x" * 100, 16)) == 16 and shorten("short", 16) == "short"


def test_findings_that_say_the_same_are_one(report: dict[str, Any]) -> None:
    text = audit_text.findings(report)
    assert text.count("dropped-ue8m0 in _C.rms_norm_per_block_quant") == 1 and "(3 times)" in text


def test_files_that_could_not_be_read_are_listed(report: dict[str, Any]) -> None:
    report["skipped"] = [{"file": "cut.py", "reason": "cut short"}]
    assert "not read: cut.py: cut short" in audit_text.render([report], "title")


def test_annotations_escape_what_github_would_read(report: dict[str, Any]) -> None:
    finding = report["findings"][0]
    finding.update(message="50%\nof::it", kernel="a,b:c", origins=[{"file": "a:b,c.py", "line": 7, "code": ""}])
    line = audit_text.github_annotations([report]).splitlines()[0]
    assert line.startswith(
        "::error file=a%3Ab%2Cc.py,line=7,title=mutated-input-copy%3A a%2Cb%3Ac::50%25%0Aof::it. Fix: "
    )


@pytest.mark.parametrize("width", [60, 80, 110, 200])
def test_text_is_as_wide_as_it_may_be(report: dict[str, Any], width: int) -> None:
    text = audit_text.render([report], "model", width)
    longest = max(report["programs"][0]["launches"], key=lambda launch: len(launch["name"]))["name"]
    wide = [line for line in text.splitlines() if len(line) > width]
    if width > 60:  # where the numbers alone take more
        assert wide == []
    assert all(
        "  extern  " in line or "  pointwise" in line or " reduction " in line or "----" in line for line in wide[1:]
    )
    table_lines = text.partition("\n\n")[2].partition("\n\n")[0].splitlines()
    assert ("findings" in table_lines[0]) == (width >= 110), "they follow below; names need the room"
    names = [line.split()[1] for line in table_lines[2:]]
    assert len(set(names)) == len({launch["name"] for launch in report["programs"][0]["launches"]}), names
    assert longest.startswith(names[-1].partition("...")[0]) and text.count("fix: ") == 6
