"""`normquant plot`: the drawings of the docs are those of the records, each by the command that stands beside it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from normquant.cli.entry import main

pytest.importorskip("matplotlib", reason="matplotlib is not installed; it comes with normquant[report]")
ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {page: page.read_text(encoding="utf-8") for page in sorted(DOCS.glob("*.md"))}
COMMANDS = {
    output: (page, command)
    for page, text in PAGES.items()
    for command, output in re.findall(r"`normquant (plot [^`]*?) --output docs/([\w-]+\.svg)`", text)
}


def test_every_drawing_stands_above_its_command() -> None:
    assert set(COMMANDS) == {path.name for path in DOCS.glob("*.svg")} and len(COMMANDS) == 5
    for name, (page, command) in COMMANDS.items():
        assert f"]({name})\n\n`normquant {command} " in PAGES[page], name


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_drawing_is_that_of_the_records(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    _, command = COMMANDS[name]
    assert main([*shlex.split(command), "--output", str(tmp_path / name)]) == 0
    drawn = (tmp_path / name).read_text(encoding="utf-8")
    assert drawn == (DOCS / name).read_text(encoding="utf-8"), f"make it anew: normquant {command} --output docs/{name}"
    assert "prefers-color-scheme: dark" in drawn and "NVIDIA H" in drawn and "measured 2026-" in drawn


def test_several_ranks_are_drawn_for_the_width_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    command = ["plot", "baselines/h200.jsonl", "--suite", "ranks", "--output", str(tmp_path / "x.svg"), "--k"]
    assert main([*command, "4096"]) == 0
    assert "K = 4096" in (tmp_path / "x.svg").read_text(encoding="utf-8")
    assert main([*command, "6144"]) == 2 and "on several ranks with K=6144" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("suite", "message"),
    [
        ("layer", "no records of a layer with both settings"),
        ("vllm", "no records of vLLM's decode steps"),
        ("ranks", "no records of normquant on several ranks"),
    ],
)
def test_records_of_another_suite_are_refused(
    suite: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.jsonl").write_text("")
    assert main(["plot", str(tmp_path / "x.jsonl"), "--suite", suite, "--output", str(tmp_path / "x.svg")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "x.svg").exists()


def test_other_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name, magic in (("x.png", b"\x89PNG"), ("x.pdf", b"%PDF")):
        path = tmp_path / name
        assert main(["plot", "baselines/h100.jsonl", "--suite", "layer", "--output", str(path)]) == 0
        assert path.read_bytes().startswith(magic)
