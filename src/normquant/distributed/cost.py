"""What an op of a group costs: the bytes that a rank sends, its hops, and the microseconds that follow from both.

A model of GPUs that reach each other over NVLink, for planning: which algorithm a call gets is in `algorithms`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from normquant.distributed.algorithms import ONE_SHOT

GROUP = 128  # values of a scale


@dataclass(frozen=True)
class GroupCall:
    """m rows of k values in bf16 with a residual, on so many ranks; sharded: the sum is not sent."""

    ranks: int
    m: int
    algorithm: str
    sharded: bool
    k: int = 7168

    @property
    def hops(self) -> int:
        """Times that data crosses from one GPU to another, one after the other."""
        return 1 if self.algorithm == ONE_SHOT else 2

    @property
    def row_bytes(self) -> float:
        """Bytes that a rank sends for a row, on average over the rows."""
        peers, part = self.ranks - 1, 2 * self.k
        if self.algorithm == ONE_SHOT:
            return peers * part
        result = self.k + 4 * self.k // GROUP + (0 if self.sharded else 2 * self.k)  # data, scales, sum
        return peers / self.ranks * (part + result)


@dataclass(frozen=True)
class Cost:
    """us = launch_us + peer_us for each peer + hop_us for each hop after the first + bytes sent at gb_per_s."""

    launch_us: float
    peer_us: float
    hop_us: float
    gb_per_s: float

    def us(self, call: GroupCall) -> float:
        """Predicted microseconds."""
        sent = call.m * call.row_bytes / (1e3 * self.gb_per_s)
        return self.launch_us + (call.ranks - 1) * self.peer_us + (call.hops - 1) * self.hop_us + sent


H200 = Cost(2.70, 0.133, 1.51, 349)  # fitted to baselines/h200.jsonl, 2 and 4 ranks, K = 7168


def fit(calls: Sequence[GroupCall], us: Sequence[float]) -> Cost:
    """The cost with the least squared relative error over measured calls."""
    terms = [[1.0, call.ranks - 1, call.hops - 1, call.m * call.row_bytes / 1e3] for call in calls]
    measured = torch.tensor(us, dtype=torch.float64)[:, None]
    found = torch.linalg.lstsq(torch.tensor(terms, dtype=torch.float64) / measured, torch.ones_like(measured))
    launch_us, peer_us, hop_us, us_per_kb = found.solution[:, 0].tolist()
    return Cost(launch_us, peer_us, hop_us, 1 / us_per_kb)
