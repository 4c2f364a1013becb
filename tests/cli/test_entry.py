"""The command line: what it prints, what it returns, and that a subcommand's trouble stays its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from normquant.cli import entry as cli
from normquant.version import VERSION

SRC = Path(__file__).parents[2] / "src"
NORMQUANT = [sys.executable, "-m", "normquant"]


def environ(*extra: Path) -> dict[str, str]:
    path = os.pathsep.join([*map(str, extra), str(SRC), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path}


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[cli.Command]:
    """A subcommand ``toy`` that evaluates its argument, and one whose module cannot be imported."""
    (tmp_path / "nq_toy.py").write_text(
        '"""Evaluate an expression.\n\nMore."""\n'
        "def add_arguments(parser):\n"
        "    parser.add_argument('expression')\n    parser.add_argument('--times', type=int)\n"
        "def fail(error):\n    raise error\n"
        "def run(args):\n    return eval(args.expression)\n"
    )
    (tmp_path / "nq_absent.py").write_text("raise ImportError('needs x: pip install normquant[x]')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "nq_toy", raising=False)
    return [cli.Command("toy", "nq_toy", "a toy"), cli.Command("absent", "nq_absent", "cannot be imported")]


@pytest.mark.parametrize("code", [0, 1])
def test_the_exit_code_is_that_of_the_command(toy: list[cli.Command], code: int) -> None:
    assert cli.main(["toy", str(code)], toy) == code


@pytest.mark.parametrize(
    ("expression", "line"),
    [
        ("fail(ValueError('K is 100,\\n  which is no multiple of 128'))", "K is 100, which is no multiple of 128"),
        ("open('/no/such/file')", "/no/such/file: No such file or directory"),
        ("fail(ImportError('needs x'))", "needs x"),
        ("fail(ValueError())", "ValueError"),
    ],
)
def test_a_known_error_is_one_line(
    toy: list[cli.Command], capsys: pytest.CaptureFixture[str], expression: str, line: str
) -> None:
    assert cli.main(["toy", expression], toy) == 2
    assert capsys.readouterr() == ("", f"normquant: error: {line}\n")


@pytest.mark.parametrize("arguments", [["--help"], ["toy", "--help"]])
def test_debug_is_in_every_help(
    toy: list[cli.Command], capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(arguments, toy)
    assert "show the traceback of an error" in capsys.readouterr().out


@pytest.mark.parametrize(("before", "after"), [(["--debug"], []), ([], ["--debug"])])
def test_debug_shows_the_traceback(
    toy: list[cli.Command], capsys: pytest.CaptureFixture[str], before: list[str], after: list[str]
) -> None:
    assert cli.main([*before, "toy", "fail(ValueError('no'))", *after], toy) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith("ValueError: no\nnormquant: error: no\n")


def test_a_defect_keeps_its_traceback_and_is_no_failed_check(
    toy: list[cli.Command], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["toy", "{}['key']"], toy) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("Traceback")
    assert err.endswith("\nKeyError: 'key'\nnormquant: error: KeyError: 'key'\n")


@pytest.mark.parametrize("code", [0, 1, "'bye'"])
def test_user_code_that_exits_decides_no_exit_code(
    toy: list[cli.Command], capsys: pytest.CaptureFixture[str], code: object
) -> None:
    assert cli.main(["toy", f"fail(SystemExit({code}))"], toy) == 2
    assert f"toy ran code that called sys.exit({code})" in capsys.readouterr().err.splitlines()[-1]


def test_a_command_that_cannot_be_imported(toy: list[cli.Command], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["absent"], toy) == 2
    assert capsys.readouterr().err == "normquant: error: needs x: pip install normquant[x]\n"
    assert cli.main(["toy", "0"], toy) == 0


def test_help_lists_the_commands_and_imports_none(toy: list[cli.Command], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"], toy)
    out = capsys.readouterr().out
    assert "    toy       a toy\n    absent    cannot be imported\n" in out
    assert "nq_toy" not in sys.modules


def test_help_of_a_command(toy: list[cli.Command], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["toy", "--help"], toy)
    out = capsys.readouterr().out
    assert out.startswith("usage: normquant toy [-h]")
    assert "Evaluate an expression.\n" in out and "--times" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["nonesuch"], "invalid choice: 'nonesuch' (choose from "),
        (["toy", "0", "--nonesuch"], "unrecognized arguments: --nonesuch"),
        (["toy", "0", "--times", "x"], "argument --times: invalid int value: 'x'"),
    ],
)
def test_wrong_usage(toy: list[cli.Command], capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(argv, toy)
    assert message in capsys.readouterr().err


def test_ctrl_c(toy: list[cli.Command], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["toy", "fail(KeyboardInterrupt())"], toy) == 130
    assert capsys.readouterr().err == "normquant: interrupted\n"


def test_ctrl_c_while_a_command_is_imported(tmp_path: Path) -> None:
    (tmp_path / "nq_slow.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nsignal.pause()\n")
    code = "from normquant import cli; raise SystemExit(cli.main(['slow'], [cli.Command('slow', 'nq_slow', '')]))"
    code = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {code}"  # nohup ignores it
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environ(tmp_path), timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "normquant: interrupted\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_output_that_cannot_be_written_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*NORMQUANT, "env"], stdout=full, stderr=subprocess.PIPE, text=True, env=environ(), timeout=60
        )
    assert (done.returncode, done.stderr) == (2, "normquant: error: [Errno 28] No space left on device\n")


def test_a_reader_that_goes_away(tmp_path: Path) -> None:
    (tmp_path / "nq_flood.py").write_text(
        "def add_arguments(parser): pass\ndef run(args):\n    for _ in range(100_000): print('line')\n    return 0\n"
    )
    code = "from normquant import cli; raise SystemExit(cli.main(['flood'], [cli.Command('flood', 'nq_flood', '')]))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ(tmp_path), text=True
    ) as process:
        assert process.stdout and process.stderr
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=60) == 141


def test_version() -> None:
    done = subprocess.run([*NORMQUANT, "--version"], capture_output=True, text=True, env=environ(), timeout=60)
    assert (done.returncode, done.stdout) == (0, f"normquant {VERSION}\n")


@pytest.mark.parametrize("broken", ["torch", "triton", "transformers"])
def test_env_runs_where_a_package_is_broken(tmp_path: Path, broken: str) -> None:
    (tmp_path / f"{broken}.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')\n")
    command = [*NORMQUANT, "env", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environ(tmp_path), timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    problem = json.loads(done.stdout)["packages"][broken]["problem"]
    assert problem == ("OSError: libcudart.so.13: cannot open shared object file" if broken == "torch" else None)


@pytest.mark.parametrize("statement", ["1 / 0", "raise SystemExit(0)", "raise SystemExit(1)"])
def test_a_user_module_that_raises_is_no_failed_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], statement: str
) -> None:
    (tmp_path / "nq_raises.py").write_text(statement)
    monkeypatch.syspath_prepend(tmp_path)
    assert cli.main(["audit", "nq_raises:build"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("normquant: error: ")


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda command: command.name)
def test_every_command_has_its_module(command: cli.Command) -> None:
    assert importlib.util.find_spec(command.module), f"{command.name}: there is no module {command.module}"
    with pytest.raises(SystemExit, match="0"):
        cli.main([command.name, "--help"])
