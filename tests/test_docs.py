"""The docs: links and paths lead somewhere, commands parse, and what is printed as Python runs."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from shared import doc_blocks

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
    """The fenced blocks of a language that run, "" for those without one."""
    return [block.code for block in doc_blocks.of(text(page)) if block.language == language and not block.not_run]


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
    shell = [(name(page), b) for page in PAGES for b in doc_blocks.of(text(name(page))) if b.language == "sh"]
    lines = [(page, line) for page, block in shell for line in block.code.splitlines()]
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


def params(language: str, joined: bool) -> list[Any]:
    """(page, code) of every block, or of a page's together; what does not run is skipped with the page's reason."""
    found = []
    for page in map(name, PAGES):
        of_page = [block for block in doc_blocks.of(text(page)) if block.language == language]
        runs = [block for block in of_page if not block.not_run]
        together = [doc_blocks.Block(language, "\n".join(b.code for b in runs), "", runs[0].line)] if runs else []
        for block in [*together, *(b for b in of_page if b.not_run)] if joined else of_page:
            marks = [pytest.mark.skip(reason=f"{page}:{block.line}: {block.not_run}")] if block.not_run else []
            found.append(pytest.param(page, block.code, id=f"{page}:{block.line}", marks=marks))
    return found


PRINTED = {
    "README.md": ["1 of 1 norm -> quant sites fused", "0 generated kernels, 2 opaque calls", "0 findings"],
    "docs/compile.md": ["1 of 1 norm -> quant sites fused", "\n0 values differ"],
    "docs/audit.md": ["3 launches", "2 launches", "opaque-boundary"],
}


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton: pip install 'normquant[nogpu]'")
@pytest.mark.parametrize(("page", "code"), params("python", joined=True))
def test_what_is_printed_as_python_runs(page: str, code: str, tmp_path: Path) -> None:
    out = run(code, tmp_path)
    assert [part for part in PRINTED.get(page, []) if part not in out] == []


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that looks like the checkout, and where a command may write."""
    for part in ("examples", "tests", "baselines"):
        (tmp_path / part).symlink_to(ROOT / part)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")  # where plots are written
    return tmp_path


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton: pip install 'normquant[nogpu]'")
@pytest.mark.parametrize(("page", "code"), params("sh", joined=False))
def test_what_is_printed_as_shell_runs(page: str, code: str, checkout: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_block_says_what_it_is() -> None:
    """python and sh run; text is output, yaml a CI's. A reason not to run belongs to a block that would."""
    found = [(name(page), block) for page in PAGES for block in doc_blocks.of(text(name(page)))]
    assert [(page, b.line) for page, b in found if b.language not in ("python", "sh", "text", "yaml")] == []
    assert [(page, b.line) for page, b in found if b.not_run and b.language in ("text", "yaml")] == []


def test_workflows_are_yaml() -> None:
    yaml = pytest.importorskip("yaml")
    workflows = [code for page in PAGES for code in blocks(name(page), "yaml")]
    assert workflows and all(isinstance(yaml.safe_load(code), dict) for code in workflows)


def test_the_page_of_the_linear_layer_prints_what_it_says(tmp_path: Path) -> None:
    assert run("\n".join(blocks("docs/linear.md", "python")), tmp_path) == "".join(blocks("docs/linear.md", "text"))


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton: pip install 'normquant[nogpu]'")
def test_the_command_for_ci_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (line,) = (line for page, line in commands() if page == "README.md" and "--expect" in line)
    without_fuse = [part for part in shlex.split(line, comments=True)[1:] if part != "--fuse"]
    assert main(without_fuse) == 1


def test_the_findings_of_vllm_are_what_the_auditor_says(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("COLUMNS", raising=False)  # which the processes of xdist have
    (line,) = re.findall(r"`normquant (audit tests/\S+ --m 64)`", text("docs/audit.md"))
    assert main(line.split()) == 0
    out = capsys.readouterr().out
    (quoted,) = (block for block in blocks("docs/audit.md", "text") if block.startswith("error: "))
    assert len(quoted.strip().split("\n\n")) == 2
    assert all(finding in out for finding in quoted.strip().split("\n\n"))
