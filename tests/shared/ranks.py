"""A function run by several processes, one for each rank, which end together or fail together."""

from __future__ import annotations

import queue
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch.multiprocessing as mp


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_ranks(
    fn: Callable[..., Any], world: int, *args: Any, timeout: float = 120.0, silent: Sequence[int] = ()
) -> list[Any]:
    """fn(rank, world, *args) in a process for each rank -> what they return, by rank.

    Raises AssertionError with the traceback of the first that raised, or saying who died or was not ready in `timeout`
    seconds; no process is left behind. silent: ranks that return nothing.
    """
    context = mp.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=_run, args=(results, fn, r, world, *args), daemon=True) for r in range(world)]
    for process in ranks:
        process.start()
    try:
        return _collect(ranks, results, time.monotonic() + timeout, silent)
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _run(results: Any, fn: Callable[..., Any], rank: int, *args: Any) -> None:
    try:
        results.put((rank, True, fn(rank, *args)))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
    # A rank stays until all are ready: its memory may be in use, and what it would take down may wait for others.
    time.sleep(600)


def _collect(ranks: list[Any], results: Any, end: float, silent: Sequence[int]) -> list[Any]:
    found: dict[int, Any] = dict.fromkeys(silent)
    while len(found) < len(ranks):
        open_ranks = sorted(set(range(len(ranks))) - set(found))
        assert time.monotonic() < end, f"ranks {open_ranks} still run"
        died = [r for r in open_ranks if ranks[r].exitcode is not None]
        try:
            rank, whole, value = results.get(timeout=1.0)
        except queue.Empty:
            assert not died, f"rank {died} died"
            continue
        assert whole, f"rank {rank} failed:\n{value}"
        found[rank] = value
    return [found[r] for r in range(len(ranks))]
