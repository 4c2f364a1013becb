"""The page for the person on call: every warning of the plugin is in it, in the words of the log."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import normquant.vllm
from normquant.vllm.compiled_experts import ITSELF
from normquant.vllm.expert_products import KEPT
from normquant.vllm.loading import SAYS_SELF

PAGE = (Path(__file__).parents[2] / "docs" / "on-call.md").read_text(encoding="utf-8")
SOURCES = sorted(Path(normquant.vllm.__file__).parent.glob("*.py"))
PASSED_ON = {"normquant: %s", "normquant %s: %s"}  # of a text made elsewhere


def texts(source: str) -> list[str]:
    """Formats of what is warned of: literals of `log.warning`, `log.log`, `say`, `stale`; %s for what is filled in."""
    found = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
        if name in ("warning", "log", "say", "stale") and call.args:
            found += [_format(arg) for arg in call.args[:2] if isinstance(arg, ast.Constant | ast.JoinedStr)]
    return found


def _format(text: ast.expr) -> str:
    if isinstance(text, ast.JoinedStr):
        parts = (part.value if isinstance(part, ast.Constant) else "%s" for part in text.values)
        return "normquant: " + "".join(map(str, parts))
    return str(text.value) if isinstance(text, ast.Constant) else ""


ALL = {text for file in SOURCES for text in texts(file.read_text(encoding="utf-8"))} - PASSED_ON


def test_the_warnings_are_found() -> None:
    assert len(ALL) >= 7 and any("goes on as vLLM has it" in text for text in ALL)


# In variables: of the model that is not compiled, of the pass, of the check.
OTHERS = (SAYS_SELF.partition(" {")[0], "left a graph as it was", "failed in a part of a graph", "is stale: ")


@pytest.mark.parametrize("text", [*sorted(ALL), *OTHERS, ITSELF, KEPT])
def test_a_warning_is_explained(text: str) -> None:
    words = max(re.split(r"%s|\{\w+\}|: $", text), key=len).strip(" :(")
    rows = [line for line in PAGE.splitlines() if line.startswith("| `normquant")]
    assert any(words in row for row in rows), f"docs/on-call.md explains no warning with {words!r}"
