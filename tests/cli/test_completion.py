"""Completion of command lines in real shells, as docs/command-line.md sets it up."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from normquant.cli.entry import COMMANDS

SRC = Path(__file__).parents[2] / "src"
BASH = """
source {script}
COMP_LINE={line!r} COMP_POINT={point} COMP_TYPE=9
COMP_WORDS=({line}) COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_python_argcomplete normquant
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """An environment with a command `normquant` that runs this checkout."""
    command = tmp_path / "bin" / "normquant"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\n# PYTHON_ARGCOMPLETE_OK\nexec {sys.executable} -m normquant "$@"\n')
    command.chmod(0o755)
    path = os.pathsep.join([str(command.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": str(SRC), "HOME": str(tmp_path), "TERM": "dumb"}


def script(shell: str, environ: dict[str, str]) -> Path:
    """What the documentation has the shell source."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    command = ["register-python-argcomplete", "--shell", shell, "normquant"]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, check=True)
    path = Path(environ["HOME"]) / f"completion.{shell}"
    path.write_text(done.stdout)
    return path


LINES = {
    "normquant vllm": {"vllm-report"},
    "normquant --ver": {"--version"},
    "normquant bench kernels --rank": {"--ranks"},
    "normquant bench vllm --policy opa": {"opaque-norm"},
    "normquant audit --target b": {"b200"},
    "normquant list spe": {"specs"},
}


@pytest.mark.parametrize("line", LINES)
def test_bash(environ: dict[str, str], line: str) -> None:
    code = BASH.format(script=script("bash", environ), line=line, point=len(line))
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, env=environ, timeout=60)
    assert {word.strip() for word in done.stdout.split()} == LINES[line], done.stderr


@pytest.mark.parametrize("line", LINES)
def test_fish(environ: dict[str, str], line: str) -> None:
    code = f"source {script('fish', environ)}; complete -C {line!r}"
    done = subprocess.run(["fish", "-c", code], capture_output=True, text=True, env=environ, timeout=60)
    assert {row.partition("\t")[0].strip() for row in done.stdout.splitlines()} == LINES[line], done.stderr


def test_fish_shows_what_each_command_is(environ: dict[str, str]) -> None:
    code = f"source {script('fish', environ)}; complete -C 'normquant '"
    done = subprocess.run(["fish", "-c", code], capture_output=True, text=True, env=environ, timeout=60)
    shown = dict(row.split("\t") for row in done.stdout.splitlines() if "\t" in row)
    assert {command.name: command.help for command in COMMANDS}.items() <= shown.items()


def test_zsh_in_a_terminal(environ: dict[str, str]) -> None:
    setup = f"autoload -U compinit; compinit -u; source {script('zsh', environ)}; PS1=; echo rea''dy\n"
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe("zsh", ["zsh", "-f", "-i"], environ)
    try:
        os.write(terminal, setup.encode())
        until(terminal, r"ready")
        os.write(terminal, b"normquant bench vllm --as-inst\t")
        until(terminal, r"--as-inst\S*alled")
    finally:
        os.close(terminal)
        os.waitpid(pid, 0)


def until(terminal: int, pattern: str, seconds: float = 60) -> None:
    """Read what a terminal shows until it has the pattern."""
    shown, end = "", time.monotonic() + seconds
    while not re.search(pattern, shown):
        ready, _, _ = select.select([terminal], [], [], max(0.0, end - time.monotonic()))
        assert ready, f"{pattern} is not in what the terminal shows: {shown!r}"
        shown += os.read(terminal, 4096).decode(errors="replace").replace("\r", "").replace("\n", "")
