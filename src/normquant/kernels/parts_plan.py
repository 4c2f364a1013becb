"""Launches of kernels that add the parts of rows: their outputs, and how programs divide a row between them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton

from normquant.kernels.capability import target
from normquant.kernels.configs import Config
from normquant.kernels.launch import Plan, kernel_spec, matrix, plan, quantized
from normquant.kernels.partial_rows import PartialRows
from normquant.kernels.tiling import divided
from normquant.spec import QuantSpec

STRIDE_UNIT = 8  # rows of x and the residual lie a multiple of 16 bytes apart


@dataclass(frozen=True)
class Outputs:
    """What is wanted beside the sum: the quantized norm, the norm in x's dtype, or both."""

    quantized: bool
    normed: bool

    def kinds(self, sharded: bool) -> tuple[int, ...]:
        """Bytes of a value of each output that the owner of a row sends: data, scale, norm, sum."""
        return (1, 4) * self.quantized + (2,) * self.normed + (2,) * (not sharded)


def row_strides(x: torch.Tensor | PartialRows, residual: torch.Tensor | None) -> tuple[int, int]:
    """Of x and the residual, in units of STRIDE_UNIT."""
    return x.stride(0) // STRIDE_UNIT, residual.stride(0) // STRIDE_UNIT if residual is not None else 0


def plan_rows(
    kernel: triton.JITFunction,
    rows: int,
    inputs: tuple[torch.Tensor | PartialRows | None, ...],
    numbers: tuple[float, ...],
    weight_offset: float,
    spec: QuantSpec,
    wanted: Outputs,
    config: Config,
    group: dict[str, object],
    prefetch: bool = False,
) -> Plan:
    """rows: that the grid has. A row is split over a cluster or not at all: a program reads its own part only.

    prefetch: whether the kernel has a constant PREFETCH, which partial sums are too young for.
    """
    x = inputs[0]
    assert x is not None
    m, k = x.shape[-2:]
    where = target(x.device)
    whole = replace(config, split=1, cluster=False)
    row = divided(k, spec, config if where.clusters and config.cluster else whole, where.clusters)
    outputs = (
        *(quantized(m, k, spec) if wanted.quantized else (None, None)),
        matrix(m, k, x.dtype),
        matrix(m, k, x.dtype) if wanted.normed else None,
    )
    ahead = {"PREFETCH": config.prefetch and where.pdl and not isinstance(x, PartialRows)} if prefetch else {}
    return plan(
        kernel, grid=(rows * (row.programs // row.cluster), 1, 1), inputs=inputs, outputs=outputs, numbers=numbers,
        where=where, config=config, cluster=row.cluster, weight_offset=weight_offset, K=k, SPEC=kernel_spec(spec),
        G=row.own[0], CLUSTER=row.cluster, LOG_WARP=row.log_warps[0], **group, **ahead,
        LATE_WEIGHT=config.late_weight, PDL=where.release(config), ON_CUDA=where.on_cuda,
    )  # fmt: skip
