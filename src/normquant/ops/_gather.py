"""Rows of all ranks of a group, on CPUs."""

from __future__ import annotations

from datetime import timedelta
from time import monotonic
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_S = 60.0  # how long a rank waits for another one
timeouts: dict[str, float] = {}  # of groups that have their own, by name


class MissingRank(RuntimeError):
    """A rank has not sent what others wait for."""


def missing(ranks: list[int], group_name: str, seconds: float, call: str) -> str:
    """The sentence that says so."""
    who = f"rank {ranks[0]} has" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} have"
    return f"{who} not sent what this rank of group {group_name!r} waits for, for {seconds:g} s, in {call}"


def group_of(name: str) -> dist.ProcessGroup:
    """The process group of that name."""
    from torch.distributed.distributed_c10d import _resolve_process_group  # builds of torch without c10d lack it

    return _resolve_process_group(name)  # type: ignore[arg-type]


def closed(ranks: list[int], group_name: str, call: str) -> str:
    """The sentence about ranks that have gone."""
    who = f"rank {ranks[0]} has" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} have"
    return f"{who} left group {group_name!r}: the connection is closed, in {call}"


def gather(x: torch.Tensor, group_name: str, call: str) -> torch.Tensor:
    """x of every rank, all of one shape -> [ranks, *x.shape].

    Each pair of ranks has messages of its own, so that an error can name who is missing; all others still get what this
    rank has, so that they name the same one.
    """
    group = group_of(group_name)
    rank, world = group.rank(), group.size()
    parts = x.new_empty((world, *x.shape))
    parts[rank] = x
    peers = [r for r in range(world) if r != rank]
    raw = parts.view(torch.uint8)  # gloo does not know every dtype
    seconds = timeouts.get(group_name, TIMEOUT_S)
    end, late, gone = monotonic() + seconds, list[int](), list[int]()
    works: list[tuple[int, Any]] = []
    for r in peers:
        try:
            works.append((r, dist.isend(raw[rank], group=group, group_dst=r)))
            works.append((r, dist.irecv(raw[r], group=group, group_src=r)))
        except RuntimeError:
            gone.append(r)
    for r, work in works:
        try:
            work.wait(timedelta(seconds=max(end - monotonic(), 0.001)))
        except RuntimeError:
            (gone if monotonic() < end else late).append(r)
    if gone:
        raise MissingRank(closed(sorted(set(gone)), group_name, call))
    if late:
        raise MissingRank(missing(sorted(set(late)), group_name, seconds, call))
    return parts
