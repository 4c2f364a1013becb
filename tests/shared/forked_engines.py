"""Processes that start with vLLM imported: forks of one that has imported it, and has compiled with Inductor once.

Of a small engine that compiles nothing, importing is most of the time. One that compiles asks the C++ compiler, in
every process, which instructions it knows and what the header of all kernels expands to.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import sys
import tempfile
import threading
from collections.abc import Mapping
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any
from unittest import mock

IMPORTED = "shared.vllm_imported"
TESTS = Path(__file__).parents[1]
FORKS = multiprocessing.get_context("forkserver")
_LOCK = threading.Lock()  # starting a process looks after all others, whose exit codes can be read once only


def start(environ: Mapping[str, str]) -> None:
    """Start the process that is forked. environ: of its imports; every fork has one of its own."""
    FORKS.set_forkserver_preload([IMPORTED])  # Python 3.11 looks for it on PYTHONPATH only
    path = os.pathsep.join([str(TESTS), environ["PYTHONPATH"]])
    with mock.patch.dict(os.environ, {**environ, "PYTHONPATH": path}, clear=True):
        forkserver.ensure_running()


def run(script: Path, argument: Any, environ: Mapping[str, str], folder: Path, seconds: float) -> tuple[int, str]:
    """The exit code and the output of a script's main function, run in a folder; what it returns is printed as JSON."""
    file, path = tempfile.mkstemp(".log", dir=folder)
    os.close(file)
    process = FORKS.Process(target=_run, args=(script, argument, dict(environ), folder, path))
    with _LOCK:
        process.start()
    if not connection.wait([process.sentinel], seconds):
        process.kill()
        raise TimeoutError(f"{script.name} did not end in {seconds} s:\n{Path(path).read_text()[-6000:]}")
    with _LOCK:
        process.join()
    assert process.exitcode is not None
    return process.exitcode, Path(path).read_text()


def _run(script: Path, argument: Any, environ: dict[str, str], folder: Path, output: str) -> None:
    assert IMPORTED in sys.modules, f"{IMPORTED} could not be imported"
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(folder)
    sys.path[:0] = environ["PYTHONPATH"].split(os.pathsep)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    print(json.dumps(runpy.run_path(str(script))["main"](argument)), flush=True)
