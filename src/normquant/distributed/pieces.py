"""More rows than a workspace has room for: two shots of as many as fit, one after the other.

A row's owner is another one then than without pieces, so that there are none where the residual stays with the owners.
"""

from __future__ import annotations

import torch

from normquant.kernels.all_reduce_add_rms_norm_quant import plan_two_shot
from normquant.kernels.configs import Config
from normquant.kernels.exchange_layout import Exchange, two_shot_bytes
from normquant.kernels.launch import Launch
from normquant.kernels.parts_plan import Outputs
from normquant.ops._op import Launcher
from normquant.spec import QuantSpec

SCALES = 4  # a piece starts at a multiple of so many rows: 16 bytes into a column of scales


def piece_rows(m: int, k: int, world: int, half: int) -> int:
    """Rows of each piece but the last, for m rows and half a buffer of so many bytes; 0 if it has no room for any."""
    unit = SCALES * world
    room = half // two_shot_bytes(unit, k, world)
    if not room:
        return 0
    pieces = -(-m // (room * unit))
    return -(-m // (pieces * unit)) * unit


def in_pieces(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float,
    spec: QuantSpec,
    wanted: Outputs,
    exchange: Exchange,
    config: Config,
) -> Launcher:
    """What runs an op on its tensors, x, the residual if there is one, and the weight."""
    m, k = x.shape
    rows = piece_rows(m, k, exchange.world, exchange.half)
    pieces = [slice(start, min(start + rows, m)) for start in range(0, m, rows)]

    def launch(piece: slice) -> Launch:
        part = None if residual is None else residual[piece]
        settings = eps, weight_offset, spec, wanted, exchange, config, False
        return Launch(plan_two_shot(x[piece], part, weight, *settings, of_rows=m))

    whole, first, last = launch(slice(m)), launch(pieces[0]), launch(pieces[-1])

    def call(*tensors: torch.Tensor) -> list[torch.Tensor]:
        *rows_of, weight = tensors
        outputs = whole.outputs()
        for piece in pieces:
            into = [output[piece] for output in outputs]
            run = last if piece is pieces[-1] else first
            run(*(t[piece] for t in rows_of), weight, exchange.table, exchange.state, into=into)
        return outputs

    return call
