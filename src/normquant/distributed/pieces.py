"""More rows than a workspace has room for: two shots of as many as fit, one after the other.

A row's owner is another one then than without pieces, so that there are none where the residual stays with the owners.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from normquant.kernels.exchange_layout import Exchange, two_shot_bytes
from normquant.kernels.launch import Launch, Plan
from normquant.ops._op import Launcher
from normquant.spec import TMA_ALIGN

RowsPlan = Callable[[torch.Tensor, torch.Tensor | None], Plan]


def piece_rows(m: int, k: int, world: int, half: int) -> int:
    """Rows of each piece but the last, for m rows and half a buffer of so many bytes; 0 if it has no room for any."""
    unit = TMA_ALIGN * world  # a piece starts 16 bytes into a column of scales, or a multiple of that
    room = half // two_shot_bytes(unit, k, world)
    if not room:
        return 0
    pieces = -(-m // (room * unit))
    return -(-m // (pieces * unit)) * unit


def in_pieces(plan: RowsPlan, x: torch.Tensor, residual: torch.Tensor | None, exchange: Exchange) -> Launcher:
    """What runs an op on its tensors, x, the residual if there is one, and the weight.

    plan: two shots of rows like these, written into outputs of as many rows as x has.
    """
    m, k = x.shape
    rows = piece_rows(m, k, exchange.world, exchange.half)
    pieces = [slice(start, min(start + rows, m)) for start in range(0, m, rows)]

    def launch(piece: slice) -> Launch:
        return Launch(plan(x[piece], None if residual is None else residual[piece]))

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
