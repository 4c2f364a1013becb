"""The ranks of a job under tensor parallelism: the other processes, and what all of them have to agree on.

vLLM's `external_launcher` makes every rank an engine of its own in a process of ours. They stay together because each
schedules the same requests; what depends on a clock is decided by the first.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

POLL_S = 0.5
FAILED = 3  # exit code of the first rank when another one has ended


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks; in a job of one GPU the only one."""

    rank: int = 0
    world: int = 1

    @property
    def suffix(self) -> str:
        """Of the names of files that every rank writes."""
        return f"-rank{self.rank}" if self.rank else ""

    def agreed(self, value: Any) -> Any:
        """The first rank's value, on all."""
        if self.world == 1:
            return value
        import torch.distributed as dist

        values = [value]
        dist.broadcast_object_list(values, src=0, group=_cpu_group())
        return values[0]

    def slowest(self, us: float) -> float:
        """The largest value of all ranks, on all."""
        if self.world == 1:
            return us
        import torch.distributed as dist

        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, us, group=_cpu_group())
        return float(max(values))

    def meet(self) -> None:
        """Wait for all ranks."""
        self.slowest(0.0)


def _cpu_group() -> Any:
    from vllm.distributed.parallel_state import get_world_group

    return get_world_group().cpu_group


def launcher_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What vLLM's `external_launcher` reads, as torchrun sets it on one host."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in place.items()}}


def free_port() -> int:
    """A TCP port of this host that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port


class OtherRanks:
    """The processes of all ranks but the first. If one of them fails, all others end, this process too: they would
    wait in a collective for ever."""

    def __init__(self, commands: Sequence[Sequence[str]]) -> None:
        self._processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=sys.stderr.fileno(), text=True)
            for command in commands
        ]
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._stopped.wait(POLL_S):
            for rank, process in enumerate(self._processes, 1):
                if (code := process.poll()) not in (None, 0) and not self._stopped.is_set():
                    print(f"rank {rank} ended with exit code {code}", file=sys.stderr, flush=True)
                    for other in self._processes:
                        other.kill()
                    os._exit(FAILED)

    def ask(self, what: str) -> None:
        """Have all of them measure what the first rank was asked for."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{what}\n")
            process.stdin.flush()

    def stop(self, grace_s: float = 10.0) -> None:
        """Wait so long for their end, and then end them."""
        self._stopped.set()
        end = time.monotonic() + grace_s
        for process in self._processes:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
