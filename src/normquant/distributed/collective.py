"""The same sum through collectives: an all-to-all of the parts, each rank's own rows, and a gather of what comes out.

As many bytes as a reduce-scatter and a gather of FP8. The collective's own reduction is not used: its order of adding
depends on the rank, and the bits on it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F

from normquant import reference
from normquant.kernels.add_parts_rms_norm_quant import plan_add_parts
from normquant.kernels.configs import Config
from normquant.kernels.launch import Launch
from normquant.kernels.partial_rows import PartialRows
from normquant.kernels.parts_plan import Outputs
from normquant.kernels.sum_of_parts import plan_sum_of_parts
from normquant.ops._op import Launcher
from normquant.ops.all_reduce_add_rms_norm_quant import own_rows
from normquant.spec import QuantSpec


def through_collectives(
    group: dist.ProcessGroup,
    eps: float,
    weight_offset: float,
    spec: QuantSpec,
    wanted: Outputs,
    sharded: bool,
    config: Config,
    with_residual: bool,
) -> Launcher:
    """What runs an op on its tensors, x, the residual if there is one, and the weight."""

    def call(x: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
        residual = tensors[0] if with_residual else None
        weight = tensors[-1]
        m, world = x.shape[0], group.size()
        if m == 0:
            return _empty(x, spec, wanted)
        own = own_rows(m, group.rank(), world)
        parts = exchange_parts(x, group)[:, : own.stop - own.start]
        residual = None if residual is None else residual[own]
        plan = plan_add_parts(parts, residual, weight, eps, weight_offset, spec, wanted, config)
        results = Launch(plan)(*(t for t in (parts, residual, weight) if t is not None))
        return _gather_results(results, x, own, group, spec, wanted, sharded)

    return call


def summed_first(x: PartialRows, call: Launcher) -> Launcher:
    """What runs an op on partial sums of the rows x and its other tensors."""
    add = Launch(plan_sum_of_parts(x))
    return lambda sums, *tensors: call(*add(sums), *tensors)


def exchange_parts(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """x [M, K] of every rank -> the parts of the rows that this rank owns, [ranks, ceil(M / ranks), K]."""
    world = group.size()
    chunk = -(-x.shape[0] // world)
    padded = F.pad(x, (0, 0, 0, world * chunk - x.shape[0])) if world * chunk > x.shape[0] else x.contiguous()
    parts = torch.empty_like(padded)
    dist.all_to_all_single(parts, padded, group=group)
    return parts.view(world, chunk, x.shape[1])


def gather_rows(own: torch.Tensor, m: int, group: dist.ProcessGroup) -> torch.Tensor:
    """The rows that each rank owns [.., N] -> all rows [m, N]."""
    world = group.size()
    padded = own.new_zeros((-(-m // world), own.shape[1]))
    padded[: own.shape[0]] = own
    rows = padded.new_empty((world * padded.shape[0], own.shape[1]))
    dist.all_gather_into_tensor(rows.view(torch.uint8), padded.view(torch.uint8), group=group)
    return rows[:m]


def _gather_results(
    results: list[torch.Tensor],
    x: torch.Tensor,
    own: slice,
    group: dist.ProcessGroup,
    spec: QuantSpec,
    wanted: Outputs,
    sharded: bool,
) -> list[torch.Tensor]:
    m, outputs = x.shape[0], []
    if wanted.quantized:
        data, scale, *results = results
        outputs = [gather_rows(data, m, group), _stored(gather_rows(scale, m, group), x.shape[1], spec)]
    total, *norm = results
    if sharded:
        outputs.append(x.new_empty(x.shape))
        outputs[-1][own] = total
    else:
        outputs.append(gather_rows(total, m, group))
    return outputs + [gather_rows(y, m, group) for y in norm]


def _stored(scale: torch.Tensor, k: int, spec: QuantSpec) -> torch.Tensor:
    """Stored scales, in rows, in the layout of `spec`."""
    return scale if spec.layout == "row" else reference.lay_out_scale(scale, k, spec)


def _empty(x: torch.Tensor, spec: QuantSpec, wanted: Outputs) -> list[torch.Tensor]:
    data, scale = reference.group_quant(x, spec)
    return [data, scale][: 2 * wanted.quantized] + [x.new_empty(x.shape) for _ in range(1 + wanted.normed)]
