"""Progress: a bar in a terminal, plain lines in a pipe, nothing where it is not wanted or not due."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from normquant.cli import progress as module
from normquant.cli.progress import compiling, showing

SRC = Path(__file__).parents[2] / "src"
IN_A_TERMINAL = """
import time
from normquant.cli import progress
progress.DELAY_S = 0.0
with progress.showing(3, quiet=QUIET, ticking=True) as shown:
    for number in range(3):
        shown.begin(f"case {number}")
        time.sleep(0.2)
        shown.result(f"result {number}")
"""


class Clock:
    """Time that passes when it is told to."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def test_plain_lines_have_the_total_and_an_estimate(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with showing(4, quiet=False) as shown:
        for number in range(4):
            clock.now += 30
            shown.result(f"case {number}")
    out, err = capsys.readouterr()
    assert out.splitlines() == [f"case {number}" for number in range(4)]
    assert err.splitlines() == [
        "[1 of 4 in 00:30, about 01:30 left]",
        "[2 of 4 in 01:00, about 01:00 left]",
        "[3 of 4 in 01:30, about 00:30 left]",
        "[4 of 4 in 02:00, about 00:00 left]",
    ]


def test_a_short_command_shows_nothing_and_a_long_one_a_line_now_and_then(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with showing(1000, quiet=False) as shown:
        for _ in range(4):
            clock.now += 1
            shown.step()
        assert capsys.readouterr().err == ""
        for _ in range(96):
            clock.now += 1
            shown.step()
    assert len(capsys.readouterr().err.splitlines()) == 1 + 95 // int(module.INTERVAL_S)


def test_quiet_is_quiet_and_loses_no_result(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with showing(2, quiet=True, ticking=True, eager=True) as shown:
        shown.begin("a step")
        clock.now += 100
        shown.result("a result")
    assert capsys.readouterr() == ("a result\n", "")


def test_what_is_eager_says_each_step_at_once(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with showing(2, quiet=False, eager=True) as shown:
        shown.begin("one")
        clock.now += 1
        shown.step()
        shown.begin("two")
    assert capsys.readouterr().err.splitlines() == ["[0 of 2 in 00:00] one", "[1 of 2 in 00:01, about 00:01 left] two"]


def test_compiling_ahead(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with compiling(quiet=False) as told:
        for done in (0, 8, 16):
            told(done, 16)
            clock.now += module.INTERVAL_S
    doing = f"compiling on {os.cpu_count()} cores"
    first, second, third = capsys.readouterr().err.splitlines()
    assert (first, third) == (f"[0 of 16 in 00:00] {doing}", f"[16 of 16 in 00:40, about 00:00 left] {doing}")
    assert second == f"[8 of 16 in 00:20, about 00:20 left] {doing}"


def in_a_terminal(code: str, **variables: str) -> str:
    """What a terminal of 80 columns is sent."""
    ours, theirs = pty.openpty()
    environ = {**os.environ, "PYTHONPATH": str(SRC), "COLUMNS": "80", **variables}
    with subprocess.Popen([sys.executable, "-c", code], stdout=theirs, stderr=theirs, env=environ) as process:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 4096):
                shown += part
        except OSError:  # the other end is closed
            pass
    os.close(ours)
    assert process.returncode == 0, shown
    return shown.decode("utf-8")


def test_a_terminal_has_a_bar_which_is_gone_at_the_end() -> None:
    shown = in_a_terminal(IN_A_TERMINAL.replace("QUIET", "False"))
    assert re.search(r"1/3 .* 00:\d\d, about 00:\d\d left case 1", shown)
    results = [line.rpartition("\r")[2] for line in shown.replace("\r\n", "\n").splitlines()]
    assert [line for line in results if line.startswith("result")] == ["result 0", "result 1", "result 2"]
    assert shown.endswith("\r") and "\x1b" not in shown, "no colour, and the line is cleared"
    assert in_a_terminal(IN_A_TERMINAL.replace("QUIET", "True")).split() == [
        "result",
        "0",
        "result",
        "1",
        "result",
        "2",
    ]


def test_a_terminal_without_utf8_has_an_ascii_bar() -> None:
    assert in_a_terminal(IN_A_TERMINAL.replace("QUIET", "False"), PYTHONIOENCODING="ascii").isascii()
