"""The processes of other ranks: they are told what to measure, are ended, and end the first when they die."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from normquant.bench.vllm.rank_processes import FAILED, OtherRanks, Ranks, free_port, launcher_environment

LISTENS = "import sys; print(sys.stdin.readline().strip(), file=sys.stderr, flush=True)"
PARENT = """
import sys, time
from normquant.bench.vllm.rank_processes import OtherRanks
OtherRanks([[sys.executable, "-c", "import time; time.sleep(60)"], [sys.executable, "-c", "import sys; sys.exit(7)"]])
time.sleep(60)
"""


def test_others_are_told_what_to_measure_and_end(capfd: pytest.CaptureFixture[str]) -> None:
    others = OtherRanks([[sys.executable, "-c", LISTENS]] * 2)
    others.ask("wall")
    others.stop()
    assert capfd.readouterr().err.count("wall") == 2


def test_one_that_hangs_is_ended_in_time() -> None:
    others = OtherRanks([[sys.executable, "-c", "import time; time.sleep(600)"]])
    start = time.monotonic()
    others.stop(grace_s=0.5)
    assert time.monotonic() - start < 30


def test_one_that_dies_ends_all_others_with_its_number() -> None:
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", PARENT], capture_output=True, text=True, timeout=120)
    assert done.returncode == FAILED and "rank 2 ended with exit code 7" in done.stderr
    assert time.monotonic() - start < 30, "rank 1, which sleeps for longer, has not ended"


def test_a_lone_rank_agrees_with_itself() -> None:
    alone = Ranks()
    alone.meet()
    assert alone.agreed("x") == "x" and alone.slowest(1.5) == 1.5 and alone.suffix == ""
    assert Ranks(2, 4).suffix == "-rank2"


def test_ranks_find_each_other_as_under_torchrun() -> None:
    found = launcher_environment(3, 4, free_port())
    assert (found["RANK"], found["LOCAL_RANK"], found["WORLD_SIZE"]) == ("3", "3", "4")
