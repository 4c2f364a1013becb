"""The parent of `normquant bench vllm`: settings of vLLM side by side, each in a process and with caches of its own.

Processes of one group start together, as most of a start is compiling on the CPU. Once all of them are ready, they take
turns measuring wall times, since what else a host does changes from minute to minute; then one after the other measures
what its GPU does. One at a time has the GPU.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normquant.bench.records import VllmRecord, current_command, today
from normquant.bench.vllm.job import Job, environment, switches, write
from normquant.version import VERSION

COMMAND = (sys.executable, "-m", "normquant.bench.vllm.worker")
LOG = "log.txt"
TAIL = 25  # lines of the log of a process that failed
POLL_S = 0.5
GRACE_S = 10.0  # from SIGTERM to SIGKILL


@dataclass(frozen=True)
class Failure:
    """A job that failed: why, and the end of its log."""

    job: Job
    reason: str
    log: str


Inspect = Callable[[Path], Mapping[str, int]]
Found = Iterator[VllmRecord | Failure]


class WorkerFailed(Exception):
    """Why a process was given up on."""


class WorkerProcess:
    """One job's process. A thread reads its lines, so that waiting for one can time out."""

    def __init__(self, job: Job, command: Sequence[str]) -> None:
        self.job = job
        path = write(job)
        self._log = (Path(job.folder) / LOG).open("w")
        self._process = subprocess.Popen(
            [*command, str(path)],
            env=environment(job),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,  # what it starts ends with it
        )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)

    def message(self, deadline: float) -> dict[str, Any]:
        """The next line that is a message. Raises WorkerFailed at the deadline and if the process ends without one."""
        while True:
            over = self._process.poll() is not None  # asked first: its last lines may still be on their way
            try:
                line = self._lines.get(timeout=POLL_S)
            except queue.Empty:
                if over:
                    raise WorkerFailed(f"ended with exit code {self._process.returncode}") from None
                if time.monotonic() > deadline:
                    raise WorkerFailed("took longer than --timeout") from None
                continue
            with contextlib.suppress(json.JSONDecodeError):
                message = json.loads(line)
                if isinstance(message, dict) and "kind" in message:
                    return message

    def ask(self, what: str) -> None:
        """Have it measure: "wall" times, or "kernels", after which it ends."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, which `message` says
            self._process.stdin.write(f"{what}\n")
            self._process.stdin.flush()

    def stop(self) -> None:
        """End it, with everything that it started, and wait for that; a second call does nothing."""
        if self._log.closed:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE_S)
        self._log.close()

    def failure(self, reason: str) -> Failure:
        """The failure to report, for a reason."""
        lines = (Path(self.job.folder) / LOG).read_text(errors="replace").splitlines()
        return Failure(self.job, reason, "\n".join(lines[-TAIL:]))


def measure(
    groups: Sequence[Sequence[Job]], timeout: float, inspect: Inspect, command: Sequence[str] | None = None
) -> Found:
    """The records of all jobs, as they come, and what failed; the rest goes on.

    groups: jobs whose processes run at the same time. timeout: seconds, for a start and for a measurement.
    inspect: findings by rule in the code that vLLM generated, from the folder of its cache.
    """
    for group in groups:
        processes: list[WorkerProcess] = []
        try:
            processes.extend(WorkerProcess(job, command or COMMAND) for job in group)
            yield from _measure_group(processes, timeout, inspect)
        finally:
            for process in processes:
                process.stop()


def _measure_group(processes: Sequence[WorkerProcess], timeout: float, inspect: Inspect) -> Found:
    deadline = time.monotonic() + timeout
    ready: list[tuple[WorkerProcess, dict[str, Any]]] = []
    for process in processes:
        try:
            ready.append((process, _expect(process, "ready", deadline)))
        except WorkerFailed as error:
            process.stop()
            yield process.failure(f"starting: {error}")
    walls: dict[WorkerProcess, list[dict[str, Any]]] = {process: [] for process, _ in ready}
    for _ in range(max((process.job.samples for process, _ in ready), default=0)):
        for process in list(walls):
            try:
                process.ask("wall")
                walls[process].append(_expect(process, "wall", time.monotonic() + timeout))
            except WorkerFailed as error:
                del walls[process]
                process.stop()
                yield process.failure(f"measuring: {error}")
    for process, facts in ready:
        if process not in walls:
            continue
        try:
            facts |= {"findings": dict(inspect(process.job.cache))}
            yield from _records(process, facts, medians(walls[process]), timeout)
        except WorkerFailed as error:
            yield process.failure(f"measuring: {error}")
        process.stop()  # before the next one measures


def medians(walls: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Of each figure of some messages of one form the median."""
    return {
        name: {size: round(statistics.median(wall[name][size] for wall in walls), 4) for size in walls[0][name]}
        for name in walls[0]
    }


def _records(
    process: WorkerProcess, facts: dict[str, Any], wall: dict[str, dict[str, float]], timeout: float
) -> Iterator[VllmRecord]:
    deadline = time.monotonic() + timeout
    process.ask("kernels")
    prefill = {"ms": wall["prefill_ms"], **_expect(process, "prefill", deadline)}
    for _ in process.job.batches:
        batch = _expect(process, "batch", deadline)
        yield record(process.job, facts, prefill, {"tpot_ms": wall["tpot_ms"][str(batch["batch"])], **batch})
    _expect(process, "done", deadline)


def _expect(process: WorkerProcess, kind: str, deadline: float) -> dict[str, Any]:
    message = process.message(deadline)
    if message.pop("kind") != kind:
        raise WorkerFailed(f"sent {message} instead of {kind!r}")
    return message


def record(job: Job, facts: dict[str, Any], prefill: dict[str, Any], batch: dict[str, Any]) -> VllmRecord:
    """One record, from the messages of a process."""
    return VllmRecord(
        suite="vllm",
        setting=job.setting,
        linear=", ".join(facts["linear_kernels"]) if job.installed else job.linear,
        layers=job.layers,
        moe=job.moe > 0,
        **batch,
        prefill_ms=prefill["ms"],
        prefill_gpu_us=prefill["gpu_us"],
        **{name: facts[name] for name in FACTS},
        policy=job.policy if job.plugin else "",
        products=job.products if job.plugin else "",
        switches=switches(job),
        tensor_parallel=job.tensor_parallel,
        compiled=job.compiled,
        version=VERSION,
        command=current_command(),
        date=today(),
    )


FACTS = (
    *("logit_error", "logit_error_p10", "logit_error_p90", "scales", "scales_not_power_of_two"),
    *("findings", "vllm", "flashinfer", "gpu", "torch", "triton"),
)
