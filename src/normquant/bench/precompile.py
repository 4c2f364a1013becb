"""Compiling ahead of a measurement, one process a core: the caches on disk are what the measuring process finds."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

import torch

from normquant.bench.cases import Case, inputs
from normquant.bench.providers import PROVIDERS, Provider
from normquant.ops import warmup

CHUNK = 8  # calls that one process makes before it takes the next ones


Told = Callable[[int, int], None]  # how many calls of how many are made


def precompile(cases: Sequence[Case], providers: Sequence[Provider], told: Told = lambda done, of: None) -> str | None:
    """Compile what this package and torch.compile run on the cases; `told` is told how far it is.

    Returns what went wrong, if something did; what is missing is compiled when it is measured.
    """
    ops = {(case.op_name, case.k): case for case in cases}
    first = [p for p in providers if p.name.startswith("torch.compile")]  # these take longest
    work = [(p.name, case) for p in first for case in ops.values() if p.build(case)]
    if any(p.name == "normquant" for p in providers):
        work += [("normquant", case) for case in ops.values()]
    return everywhere(_compile, work, chunk=1, told=told)


def _compile(provider: str, case: Case) -> None:
    if provider == "normquant":
        warmup(case.op_name, case.k, case.spec)
        return
    run = PROVIDERS[provider].build(case)
    for m in (1, 2):  # the second stands for all others
        if run is not None:
            run(inputs(Case(case.op, m, case.k, case.normed, case.spec), 1)[0])
    torch.cuda.synchronize()


def everywhere(
    call: Callable[..., None], work: Sequence[tuple], chunk: int = CHUNK, told: Told = lambda done, of: None
) -> str | None:
    """Make all calls, each with one tuple of arguments, in a process a core; returns what went wrong, None if nothing.

    A call that fails, or ends its process, does not keep those in other processes from going on.
    """
    if not work:
        return None
    troubles, done = [], 0
    told(done, len(work))
    chunks = [work[i : i + chunk] for i in range(0, len(work), chunk)]
    with ProcessPoolExecutor(min(len(chunks), os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(_all, call, part): part for part in chunks}
        for future in as_completed(futures):
            try:
                troubles += future.result()
            except BrokenProcessPool as error:
                return f"compiling ahead stopped, a process died: {error}"
            done += len(futures[future])
            told(done, len(work))
    return f"{len(troubles)} of {len(work)} did not compile ahead, the first: {troubles[0]}" if troubles else None


def _all(call: Callable[..., None], work: Sequence[tuple]) -> list[str]:
    troubles = []
    for args in work:
        try:
            call(*args)
        except Exception as error:
            troubles.append(f"{_shown(args)}: {type(error).__name__}: {error}")
    return troubles


def _shown(args: tuple[Any, ...]) -> str:
    return ", ".join(map(str, args))
