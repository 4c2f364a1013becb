"""docs/exit-codes.md: every command and every code that it names, each run."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from shared.generated_code import ON

from normquant.cli.entry import COMMANDS, main

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "exit-codes.md").read_text(encoding="utf-8")
LAYER = str(ON)
NORMQUANT = [sys.executable, "-m", "normquant"]

# argv, where {name} is a file of the fixture below -> what stderr, or stdout of a failed comparison, has
HOLDS: dict[str, str] = {
    f"audit {LAYER} --expect rms_norm_per_block_quant=3": "",
    "compare {fast} {fast} --fail-if-slower 5%": "",
    "compare {fast} {slow}": "",
    "env": "",
    "list rules": "",
    "--version": "",
    "--help": "",
}
FAILS: dict[str, str] = {
    f"audit {LAYER} --fail-on dropped-ue8m0": "failed: dropped-ue8m0 in",
    f"audit {LAYER} --expect mm=3": "failed: expected 3 of mm, the code launches 0",
    f"audit {LAYER} --max-bytes 1M": "failed: ",
    "compare {fast} {slow} --fail-if-slower 5%": "1 cases are slower by more than 5.0%",
}
BROKEN: dict[str, str] = {
    "": "required: COMMAND",
    "audit": "nothing to audit",
    "audit {empty}": "error: ",
    "audit no/such/file.py": "no such file or directory",
    "audit users_model:build": "error: ",
    f"audit {LAYER} --fuse": "--fuse is not read with generated code",
    f"audit {LAYER} --fail-on nonesuch": "unknown rule nonesuch",
    "compare {empty} {fast}": "no case of provider 'normquant' in common",
    "compare {fast} {broken}": "not JSON",
    "bench kernels": "there is no CUDA GPU here",
    "bench decode": "there is no CUDA GPU here",
    "bench layer --output no/such/file": "no/such is not a directory",
    "tune": "there is no CUDA GPU here",
    "plot {fast} --k 3 --output {made}": "error: ",
    "vllm-report {folder}": "no normquant.jsonl under",
    "env --nonesuch": "unrecognized arguments: --nonesuch",
    "list nonesuch": "invalid choice: 'nonesuch'",
}


def table(heading: str) -> list[list[str]]:
    """The rows of the table whose header begins with a word."""
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in PAGE.splitlines() if line[:1] == "|"]
    first = next(number for number, row in enumerate(rows) if row[0] == heading)
    last = next(
        (number for number, row in enumerate(rows[first:], first) if row[0] == "command" and number > first), None
    )
    return rows[first + 2 : last]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    case = {"suite": "kernels", "op": "group_quant", "m": 1, "k": 128, "provider": "normquant", "gpu": "H100"}
    for name, us in (("fast", 1.0), ("slow", 1.2)):
        (tmp_path / name).write_text(json.dumps(case | {"us": us, "us_p10": us, "us_p90": us}))
    (tmp_path / "empty").write_text("")
    (tmp_path / "broken").write_text("{")
    (tmp_path / "folder").mkdir()
    (tmp_path / "users_model.py").write_text("def build():\n    raise RuntimeError('out of luck')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "users_model", raising=False)  # of another test
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return {name: str(tmp_path / name) for name in ("fast", "slow", "empty", "broken", "folder", "made")}


def code_of(line: str, files: dict[str, str]) -> int:
    try:
        return main([word.format(**files) for word in line.split()])
    except SystemExit as ended:  # of argparse
        return int(ended.code or 0)


@pytest.mark.parametrize(
    ("line", "said", "code"),
    [(line, said, code) for code, cases in enumerate((HOLDS, FAILS, BROKEN)) for line, said in cases.items()],
    ids=lambda value: str(value).replace(LAYER, "LAYER"),
)
def test_the_code_of(
    line: str, said: str, code: int, files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of(line, files) == code
    out, err = capsys.readouterr()
    assert said in err + out and "Traceback" not in err
    assert code != 0 or err == ""
    assert not Path(files["made"]).exists()


def test_the_demo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from normquant.cli import demo
    from normquant.demo import demonstration, render, sections

    found = SimpleNamespace(exact=True, all_fused=False)
    monkeypatch.setattr(demonstration, "demonstrate", lambda progress: found)
    for module, name in ((sections, "sections"), (sections, "verdict"), (render, "as_text")):
        monkeypatch.setattr(module, name, lambda *given: "")
    monkeypatch.setattr(demo, "require", lambda: None)
    assert main(["demo", "--quiet"]) == 1
    found.all_fused = True
    assert main(["demo", "--quiet"]) == 0

    def lacks() -> None:
        raise ImportError("normquant demo needs triton")

    monkeypatch.setattr(demo, "require", lacks)
    assert main(["demo", "--quiet"]) == 2
    assert capsys.readouterr().err == "normquant: error: normquant demo needs triton\n"


def environ(*folders: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*folders, ROOT / "src")))}


def test_ctrl_c_is_130_and_leaves_the_old_report(tmp_path: Path) -> None:
    (tmp_path / "users_model.py").write_text(
        "import time\ndef build():\n    print('building', flush=True)\n    while True:\n        time.sleep(0.1)\n"
    )
    report = tmp_path / "report.html"
    report.write_text("old")
    command = [*NORMQUANT, "audit", "users_model:build", "--html", str(report), "--json", str(tmp_path / "new.json")]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environ(tmp_path),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # also where tests run with nohup
    ) as process:
        try:
            assert process.stdout and process.stdout.readline() == "building\n"
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
    lines = [line for line in err.splitlines() if not line.startswith("[")]  # of progress
    assert (process.returncode, out, lines) == (130, "", ["normquant: interrupted"])
    assert report.read_text() == "old" and sorted(p.name for p in tmp_path.glob("*.*")) == [
        "report.html",
        "users_model.py",
    ]


def test_a_pipe_whose_reader_is_gone_is_141() -> None:
    sizes = ",".join(map(str, range(1, 6)))  # more text than a pipe holds
    line = f"set -o pipefail; {sys.executable} -m normquant audit {LAYER} --json --m {sizes} | head -n 1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environ(), timeout=120)
    assert (done.returncode, done.stderr) == (141, "")


def test_output_that_nobody_takes_is_no_error_and_an_error_stays_one_line() -> None:
    done = subprocess.run(
        [*NORMQUANT, "list", "rules"], stderr=subprocess.PIPE, env=environ(), preexec_fn=lambda: os.close(1)
    )
    assert (done.returncode, done.stderr) == (0, b"")
    command = [*NORMQUANT, "audit", "no/such/file.py"]
    done = subprocess.run(command, stderr=subprocess.PIPE, env=environ(), preexec_fn=lambda: os.close(1))
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1


def test_the_page_has_every_command_and_every_code() -> None:
    codes = {int(row[0]) for row in table("code")}
    entry = importlib.import_module("normquant.cli.entry")
    assert codes == {0, 1, entry.EXIT_ERROR, entry.EXIT_INTERRUPTED, entry.EXIT_BROKEN_PIPE}
    rows = {re.sub("`normquant (.*)`", r"\1", row[0]): row[1] for row in table("command")}
    assert set(rows) == {command.name for command in COMMANDS}
    fail = {line.split()[0] for line in FAILS} | {"demo"}
    assert {name for name, when in rows.items() if when != "never"} == fail
    assert {line.split()[0] for line in BROKEN if line} | {"demo"} == set(rows)
