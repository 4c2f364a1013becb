"""Compile the kernels that a model will launch before it serves its first request."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import TYPE_CHECKING

import torch

from normquant.kernels import capability
from normquant.ops import DEFAULT
from normquant.spec import QuantSpec, Rope

if TYPE_CHECKING:
    from normquant.kernels.configs import Config

LATENT = (512, 64)  # kv_a and k_pe beside q_a, of DeepSeek-V3
EPS = 1e-6


def warmup(
    op: str,
    k: int,
    spec: QuantSpec = DEFAULT,
    *,
    dtype: torch.dtype = torch.bfloat16,
    weight_dtype: torch.dtype | None = None,
    weight_offset: float = 0.0,
    latent: tuple[int, int] = LATENT,
    rope: Rope = "interleaved",
    device: torch.device | str = "cuda",
) -> int:
    """Launch once every kernel that an op may choose for rows of k values, and return how many there are.

    A kernel is compiled for an op, K, spec, dtypes and launch config. The config depends on the number of rows, so
    without a warm-up the first batch of each range of sizes waits for a compile, about a second, or for a load from
    Triton's cache on disk, some milliseconds. Rows may then be any number and any aligned distance apart.

    op: a name in `torch.ops.normquant`, such as "add_rms_norm_quant" or "add_rms_norm_quant_with_norm".
    k: values of a row that are quantized; of latent_norm_quant the q_a part, `latent` being the other two.
    weight_dtype: of the norm's weight, `dtype` unless given. Raises ValueError for an unknown op, or on a CPU.
    """
    from normquant.kernels import configs

    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here; warmup launches kernels on one")
    found = capability.target(device).capability
    if found is None:
        raise ValueError(f"there is nothing to compile for {device}; warmup needs a CUDA device")
    run = _launcher(op, k, spec, dtype, weight_dtype or dtype, weight_offset, latent, rope, device)
    choices = configs.configs(op.removesuffix("_with_kv"), k, found)
    for config in choices:
        run(config)
    return len(choices)


def _launcher(
    op: str,
    k: int,
    spec: QuantSpec,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    weight_offset: float,
    latent: tuple[int, int],
    rope: Rope,
    device: torch.device | str,
) -> Callable[[Config], object]:
    """A launch of `op` on two rows with a config."""
    from normquant.kernels.group_quant import group_quant
    from normquant.kernels.latent_norm_quant import latent_norm_quant
    from normquant.kernels.rms_norm_quant import op_name, rms_norm_quant
    from normquant.kernels.silu_mul_quant import silu_mul_quant

    def rows(width: int) -> torch.Tensor:
        return torch.zeros(2, width, dtype=dtype, device=device)

    def weight(width: int) -> torch.Tensor:
        return torch.zeros(width, dtype=weight_dtype, device=device)

    if op == "group_quant":
        return lambda config: group_quant(rows(k), spec, config)
    if op == "silu_mul_quant":
        return lambda config: silu_mul_quant(rows(2 * k), spec, config)
    if op in (name := "latent_norm_quant", f"{name}_with_kv"):
        c, r = latent
        cos, sin = rows(r).chunk(2, dim=1)
        positions = torch.zeros(2, dtype=torch.int64, device=device)
        return lambda config: latent_norm_quant(
            rows(k + c + r), weight(k), weight(c), cos, sin, positions, EPS, rope, spec, op != name, config
        )
    for add, normed in product((False, True), repeat=2):
        if op == op_name(add, normed):
            residual = rows(k) if add else None
            return lambda config: rms_norm_quant(rows(k), residual, weight(k), EPS, spec, weight_offset, normed, config)
    raise ValueError(f"op is {op!r}; accepted: the ops of torch.ops.normquant, such as 'add_rms_norm_quant'")
