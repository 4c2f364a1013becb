"""Which algorithm and which launch config a call gets, and the call itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from normquant.distributed.collective import summed_first, through_collectives
from normquant.distributed.group_facts import measured_table
from normquant.distributed.pieces import in_pieces, piece_rows
from normquant.distributed.workspace import Workspace
from normquant.kernels import all_reduce_add_rms_norm_quant as kernels
from normquant.kernels.configs import Config
from normquant.kernels.exchange_layout import one_shot_bytes, two_shot_bytes
from normquant.kernels.launch import Launch
from normquant.kernels.partial_rows import PartialRows
from normquant.kernels.parts_plan import Outputs
from normquant.kernels.tiling import power_of_two
from normquant.ops._op import Launcher, cached
from normquant.ops.all_reduce_add_rms_norm_quant import check
from normquant.spec import QuantSpec

ONE_SHOT, TWO_SHOT, PIECES, COLLECTIVE = "one_shot", "two_shot", "two_shot_in_pieces", "collective"


@dataclass(frozen=True)
class Choice:
    """An algorithm, and how its kernel is launched."""

    algorithm: str
    config: Config


def choose(m: int, k: int, world: int, half: int, sharded: bool) -> Choice:
    """The choice for m rows of k values on so many ranks, whose workspaces have halves of so many bytes.

    It depends on nothing that differs between ranks.
    """
    config = launch_config(k)
    if m <= one_shot_rows(world, k, sharded) and one_shot_bytes(m, k, world) <= half:
        return Choice(ONE_SHOT, config)
    if two_shot_bytes(m, k, world) <= half:
        return Choice(TWO_SHOT, config)
    if not sharded and piece_rows(m, k, world, half):
        return Choice(PIECES, config)
    return Choice(COLLECTIVE, config)


@cache
def one_shot_rows(world: int, k: int, sharded: bool) -> int:
    """Up to how many rows of k values one shot is chosen: what `one_shot_rows.json` says.

    Ranks that it lacks have the rows of the next higher number, or else of the highest; widths that it lacks have the
    rows that hold as many values as those of the nearest one.
    """
    table: dict[str, dict[str, int]] = measured_table()["sharded" if sharded else "whole"]
    ranks = [int(n) for n in table]
    rows = table[str(min((n for n in ranks if n >= world), default=max(ranks)))]
    nearest = min(map(int, rows), key=lambda width: abs(math.log(width / k)))
    return rows[str(nearest)] * nearest // k


def launch_config(k: int) -> Config:
    """8 values a thread, loads of 16 bytes, and a long row over a cluster."""
    split = 8 if k >= 4096 else 4 if k >= 2048 else 1
    warps = max(1, min(16, power_of_two(-(-k // split)) // 256))
    return Config(warps, split=split, cluster=split > 1, prefetch=True)


class GroupRunner:
    """Runs the ops of one group on its GPUs."""

    def __init__(self, workspace: Workspace, choose: Callable[[int, int, int, int, bool], Choice] = choose) -> None:
        self.workspace = workspace
        self.choose = choose
        self._calls: dict[str, Callable[..., Any]] = {}

    def __call__(self, op: str, with_residual: bool, quantized: bool, normed: bool, *args: Any) -> Any:
        """The op's outputs; launches of the same kind are worked out once."""
        call = self._calls.get(op)
        if call is None:
            call = self.cached(op, partial(self.launcher, with_residual, quantized, normed))
        return call(*args)

    def cached(self, name: str, make: Callable[..., Launcher]) -> Callable[..., Any]:
        """What calls on the group; `make` is asked for a launcher once for arguments of each kind."""
        call = self._calls.get(name)
        if call is None:
            call = self._calls[name] = cached(f"{name}@{self.workspace.serial}", make)
        return call

    def launcher(self, with_residual: bool, quantized: bool, normed: bool, *args: Any) -> Launcher:
        """What runs an op on the tensors of arguments like these; partial sums of x in its place where x is such."""
        inputs = args if with_residual else (args[0], None, *args[1:])
        return self.work_out(Outputs(quantized, normed), *inputs)

    def work_out(
        self,
        wanted: Outputs,
        x: torch.Tensor | PartialRows,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        weight_offset: float,
        sharded: bool,
        group_name: str,
        spec_text: str,
    ) -> Launcher:
        """The same for the arguments by name. Partial rows have been checked."""
        spec = QuantSpec.decode(spec_text).at(x.shape[0])
        if not isinstance(x, PartialRows):
            check(x, residual, weight, eps, weight_offset, spec)
        for name, t in (("x", x), ("residual", residual)):
            if isinstance(t, torch.Tensor) and t.data_ptr() % 16:
                raise ValueError(f"{name} starts at {t.data_ptr():#x}; accepted: a multiple of 16 bytes")
        exchange, group = self.workspace.exchange, self.workspace.group
        choice = self.choose(x.shape[0], x.shape[1], group.size(), self.workspace.half, sharded)
        settings = eps, weight_offset, spec, wanted
        pieces = choice.algorithm == PIECES
        if exchange is None or choice.algorithm == COLLECTIVE or (pieces and isinstance(x, PartialRows)):
            call = through_collectives(group, *settings, sharded, choice.config, residual is not None)
            return summed_first(x, call) if isinstance(x, PartialRows) else call
        if pieces and isinstance(x, torch.Tensor):
            others, m = (weight, *settings, exchange, choice.config, False), x.shape[0]
            return in_pieces(lambda x, r: kernels.plan_two_shot(x, r, *others, of_rows=m), x, residual, exchange)
        args = (x, residual, weight, *settings, exchange, choice.config)
        one_shot = choice.algorithm == ONE_SHOT
        launch = Launch(kernels.plan_one_shot(*args) if one_shot else kernels.plan_two_shot(*args, sharded))
        return lambda *tensors: launch(*tensors, exchange.table, exchange.state)
