"""`normquant list`: every name that there is, with a line about it, whatever the width."""

from __future__ import annotations

import pytest

from normquant import specs
from normquant.audit.rules import RULE_IDS
from normquant.bench.providers import PROVIDERS
from normquant.cli import list as command
from normquant.cli.entry import main
from normquant.ops import OPS
from normquant.spec import QuantSpec

NAMES = {
    "ops": list(OPS),
    "specs": [name for name, value in vars(specs).items() if isinstance(value, QuantSpec)],
    "rules": list(RULE_IDS),
    "providers": list(PROVIDERS),
}


@pytest.mark.parametrize("kind", command.KINDS)
def test_each_name_has_its_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert main(["list", kind]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("  ")[0] for line in lines] == NAMES[kind]
    assert all(len(line.partition("  ")[2].split()) > 2 for line in lines), "a name without a text"
    starts = {len(line) - len(line.partition("  ")[2].lstrip()) for line in lines}
    assert len(starts) == 1


def test_lines_are_as_wide_as_the_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["list", "specs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 60 or len(line.split()) <= 2 for line in lines), "only a long word may be longer"
    assert len(lines) > len(NAMES["specs"])
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == NAMES["specs"]


def test_a_kind_that_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["list", "kernels"])
    assert "invalid choice: 'kernels'" in capsys.readouterr().err
