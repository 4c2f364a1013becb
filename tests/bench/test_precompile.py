"""Compiling in other processes: all of it is done, and what fails there is said and not raised."""

import os
from pathlib import Path

from normquant.bench.precompile import everywhere


def touch(folder: str, name: str) -> None:
    (Path(folder) / name).touch()


def refuse(folder: str, name: str) -> None:
    if name == "3":
        raise ValueError("not this one")
    touch(folder, name)


def die(folder: str, name: str) -> None:
    os._exit(1)


def test_every_call_is_made(tmp_path: Path) -> None:
    assert everywhere(touch, [(str(tmp_path), str(i)) for i in range(20)]) is None
    assert len(list(tmp_path.iterdir())) == 20


def test_a_call_that_fails_is_said(tmp_path: Path) -> None:
    trouble = everywhere(refuse, [(str(tmp_path), str(i)) for i in range(9)], chunk=2)
    assert trouble is not None and trouble.startswith("1 of 9 did not compile ahead") and "not this one" in trouble
    assert len(list(tmp_path.iterdir())) == 8


def test_a_process_that_dies_is_said(tmp_path: Path) -> None:
    trouble = everywhere(die, [(str(tmp_path), "x")])
    assert trouble is not None and trouble.startswith("compiling ahead stopped, a process died")


def test_nothing_to_do() -> None:
    assert everywhere(touch, []) is None
