"""Weights of linear layers whose blocks differ in magnitude, and the specs of activations that the layer takes."""

from __future__ import annotations

import torch

from normquant import QuantSpec

SIZES = [(2112, 1536), (300, 384), (128, 128), (1, 256), (129, 2304)]  # N, K
SPECS = {
    f"{scale}-{layout}": QuantSpec(scale=scale, layout=layout)
    for scale in ("fp32", "ue8m0")
    for layout in ("row", "col", "col_tma")
}


def weight_of(n: int, k: int) -> torch.Tensor:
    """[N, K] with blocks of very different magnitude, and one of zeros."""
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(n + k))
    w *= torch.logspace(-4, 4, n).unsqueeze(1) * torch.logspace(2, -2, k)
    w[:128, :128] = 0
    return w


def linear(bias: bool, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Linear:
    """K = 384, N = 300; the same values each time."""
    torch.manual_seed(0)
    return torch.nn.Linear(384, 300, bias=bias, dtype=dtype)
