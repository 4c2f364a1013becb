"""Compile ahead what a pair may launch for few rows, as `normquant.warmup` does for an op."""

from __future__ import annotations

from typing import Any

import torch

from normquant.kernels import capability
from normquant.kernels.product_configs import BLOCK, FEW_ROWS, product_config, rows_of_program
from normquant.linear.split_product import launch_pair
from normquant.ops import OPS, Examples
from normquant.ops._examples import HEAD_DIM, LATENT
from normquant.spec import QuantSpec, Rope

FP8 = torch.float8_e4m3fn
Key = tuple[Any, ...]


def few_rows(op: str, k: int, n: int, width: int, spec: QuantSpec, device: torch.device) -> dict[Key, int]:
    """What decides which kernels a pair launches for up to 64 rows -> the fewest rows that have it.

    width: K of the op, as its launch configs know it.
    """
    from normquant.kernels import configs

    found: dict[Key, int] = {}
    where = capability.target(device).capability
    for m in range(1, FEW_ROWS + 1):
        own = configs.config(OPS[op].configs, width, m, where, of_parts=True) if OPS[op].configs else None
        found.setdefault((rows_of_program(m), product_config(k, n, m, where), own, spec.at(m)), m)
    return found


def warm_pair(
    op: str,
    product: tuple[int, int],
    k: int,
    spec: QuantSpec,
    *,
    dtype: torch.dtype,
    device: torch.device,
    weight_dtype: torch.dtype | None = None,
    weight_offset: float = 0.0,
    latent: tuple[int, int] = LATENT,
    rope: Rope = "interleaved",
    limit: float | None = None,
    head_dim: int = HEAD_DIM,
) -> int:
    """Launch once every kernel that the pair of an op may choose for few rows; how many numbers of rows that took.

    product: its K and N. k and all else: as for `normquant.warmup`.
    """
    inner, n = product
    wanted = few_rows(op, inner, n, k, spec, device)
    weight, weight_scale = (
        torch.empty(n, inner, dtype=FP8, device=device),
        torch.ones(-(-n // BLOCK), inner // BLOCK, device=device),
    )
    for m in wanted.values():
        sizes = Examples(m, k, device, dtype, weight_dtype or dtype, weight_offset, latent, rope, 0, 0, limit, head_dim)
        example = OPS[op].example(sizes)
        rest = (*(value for name, value in example.items() if name != "x"), spec)
        data, scale = torch.empty(m, inner, dtype=FP8, device=device), torch.ones(m, inner // BLOCK, device=device)
        launch = launch_pair(OPS[op], (data, scale, weight, weight_scale, dtype), rest)
        launch(data, scale, weight, weight_scale, *(value for value in rest if isinstance(value, torch.Tensor)))
    return len(wanted)
