"""Rotary embedding of the last values of every head, as the queries of latent attention need it.

For the compile pass; there is no public function. The spec says only how the products are rounded.
"""

from __future__ import annotations

from typing import Any

import torch

from normquant import reference
from normquant.ops._examples import Examples
from normquant.ops._op import Op, Traffic, register
from normquant.ops._tensors import ACTIVATION_BYTES, check_angles, describe, names
from normquant.spec import ACTIVATION_DTYPES, QuantSpec

HEAD = 192  # values of a head of DeepSeek-V3


def _check(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    heads: int,
    r: int,
    rope: str,
    spec: QuantSpec,
) -> None:
    """x must be [M, heads * D] bf16 or fp16 with last stride 1, r even and at most D; the rest as for the latents."""
    if x.dim() != 2 or x.dtype not in ACTIVATION_DTYPES or x.stride(1) != 1:
        raise ValueError(
            f"x is {describe(x)} with stride {x.stride()}; accepted: [M, H * D], {names(ACTIVATION_DTYPES)}, last "
            f"stride 1"
        )
    if heads <= 0 or x.shape[1] == 0 or x.shape[1] % heads:
        raise ValueError(f"x has {x.shape[1]} columns, which are not {heads} heads of one width")
    if r <= 0 or r % 2 or r > x.shape[1] // heads:
        raise ValueError(f"r is {r}; accepted: an even number of the {x.shape[1] // heads} values of a head")
    check_angles(x, cos, sin, positions, r, rope)


def _fake(x, *args):
    return x.new_empty(x.shape)


def _plan(*args, config=None):
    from normquant.kernels.rope_last import plan_rope_last

    return plan_rope_last(*args)


def _traffic(m: int, k: int, spec: QuantSpec, *, r: int = 64) -> Traffic:
    return m * (k + r) * ACTIVATION_BYTES, m * k * ACTIVATION_BYTES  # of cos and sin a row for each of x


def _example(e: Examples) -> dict[str, Any]:
    r = e.latent[1]
    cos, sin = e.angles(r)
    return {
        "x": e.rows(e.k),
        "cos": cos,
        "sin": sin,
        "positions": e.positions(),
        "heads": max(1, e.k // HEAD),
        "r": r,
        "rope": e.rope,
    }


def _sizes(x: torch.Tensor, *args: Any) -> dict[str, Any]:
    return {"k": x.shape[-1]}


register(
    Op(
        name="rope_last",
        schema="(Tensor x, Tensor cos, Tensor sin, Tensor? positions, int heads, int r, str rope, str spec) -> Tensor",
        check=_check,
        fake=_fake,
        reference=reference.rope_last,
        plan=_plan,
        traffic=_traffic,
        example=_example,
        sizes=_sizes,
        configs="",
        widths=(),
    )
)
