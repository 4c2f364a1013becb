"""The docs: links and paths lead somewhere, commands parse, and what is printed as Python runs."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from normquant.cli.entry import COMMANDS, main

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "normquant"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
PLACES = (ROOT, PACKAGE, PACKAGE / "kernels")  # what a path in a code span may be relative to
ELSEWHERE = re.compile(r"tests/(compile/passes|kernels/core|compile/fusions_e2e)/")  # files of vLLM's own tests
MADE = ("my_model.py", "normquant.jsonl")  # by the reader, or by a run
HAS_TRITON = importlib.util.find_spec("triton") is not None

WITHOUT_EXTRAS = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "vllm", "transformers"):
            raise ImportError(f"{name} is blocked by this test")
sys.meta_path.insert(0, Blocked())
"""


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a language, "" for those without one."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text(page), re.M | re.S)
    return [code for found, code in fenced if found == language]


def prose(page: str) -> str:
    return re.sub(r"^```.*?^```$", "", text(page), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page in links."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def run(code: str, cache: Path) -> str:
    """What a script prints, in a process of its own."""
    path = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, env=environment, cwd=cache)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(name(page))):
        path, _, anchor = link.partition("#")
        if not link.startswith(("http://", "https://")):
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_paths_in_code_spans_exist(page: Path) -> None:
    spans = re.findall(r"`([\w./-]+(?:\.py|\.md|\.json|\.jsonl))`", prose(name(page)))
    if page.stem == "architecture":
        spans += re.findall(r"`([\w./-]+/)`", prose(name(page)))
    paths = [span for span in spans if span not in MADE and not ELSEWHERE.match(span)]
    assert [path for path in paths if not any((place / path).exists() for place in PLACES)] == []


def test_the_map_names_every_room() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    named = {span.split("/")[0] for span in re.findall(r"`([\w/]+/)`", prose("docs/architecture.md"))}
    assert rooms - named == set()


def commands() -> list[tuple[str, str]]:
    """(page, line) for every line of a block that calls normquant."""
    lines = [(name(page), line) for page in PAGES for block in blocks(name(page), "") for line in block.splitlines()]
    return [(page, line) for page, line in lines if line.startswith("normquant ")]


@pytest.mark.parametrize(("page", "line"), commands())
def test_commands_parse(page: str, line: str) -> None:
    _, command, *arguments = shlex.split(line, comments=True)
    module = {c.name: c.module for c in COMMANDS}[command]
    parser = argparse.ArgumentParser(exit_on_error=False)
    importlib.import_module(module).add_arguments(parser)
    parser.parse_args(arguments)


def test_the_readme_runs_with_torch_alone(tmp_path: Path) -> None:
    out = run(WITHOUT_EXTRAS + blocks("README.md", "python")[0], tmp_path)
    assert "1 of 1 norm -> quant sites fused" in out


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton: pip install 'normquant[nogpu]'")
@pytest.mark.parametrize(
    ("page", "printed"),
    [
        ("README.md", ["3 launches", "opaque-boundary: normquant.group_quant"]),
        ("docs/compile.md", ["1 of 1 norm -> quant sites fused"]),
        ("docs/audit.md", ["3 launches", "2 launches", "opaque-boundary"]),
    ],
)
def test_what_is_printed_runs(page: str, printed: list[str], tmp_path: Path) -> None:
    out = run("\n".join(blocks(page, "python")), tmp_path)
    assert [part for part in printed if part not in out] == []


def test_the_page_of_the_linear_layer_prints_what_it_says(tmp_path: Path) -> None:
    assert run("\n".join(blocks("docs/linear.md", "python")), tmp_path) == blocks("docs/linear.md", "")[0]


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton: pip install 'normquant[nogpu]'")
def test_the_command_for_ci_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model,) = (block for block in blocks("docs/audit.md", "python") if "def build" in block)
    (tmp_path / "my_model.py").write_text(model, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    (line,) = (line for page, line in commands() if page == "docs/audit.md" and "--expect" in line)
    assert main(shlex.split(line, comments=True)[1:]) == 0
    assert main(["audit", "my_model:build", "--expect", "rms_norm_quant=1"]) == 1


def test_the_findings_of_vllm_are_what_the_auditor_says(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    (line,) = re.findall(r"`normquant (audit tests/\S+ --m 64)`", text("docs/audit.md"))
    assert main(line.split()) == 0
    out = capsys.readouterr().out
    (quoted,) = (block for block in blocks("docs/audit.md", "") if block.startswith("error: "))
    assert len(quoted.strip().split("\n\n")) == 2
    assert all(finding in out for finding in quoted.strip().split("\n\n"))
