"""Activations that find faults: ordinary rows, and rows with every kind of awkward value."""

from __future__ import annotations

import torch


def activations(
    m: int, k: int, dtype: torch.dtype = torch.bfloat16, *, seed: int = 0, strided: bool = False
) -> torch.Tensor:
    """[m, k] standard normal; `strided` rows lie 2k+16 apart, as the slice of a wider output."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + m * 8191 + k)
    wide = torch.randn(m, 2 * k + 16 if strided else k, generator=generator).to(dtype)
    return wide[:, :k]


def awkward(
    m: int, k: int, dtype: torch.dtype = torch.bfloat16, *, seed: int = 0, strided: bool = False
) -> torch.Tensor:
    """As `activations`, with zeros, negative zeros, denormals, inf, NaN, huge values and outliers, a kind a row."""
    x = activations(m, k, dtype, seed=seed, strided=strided)
    tiny = torch.finfo(dtype).smallest_normal
    kinds = (
        lambda row: row.zero_(),
        lambda row: row[: k // 2].fill_(-0.0),
        lambda row: row[::3].fill_(tiny / 4),
        lambda row: row[5::128].fill_(3e4),  # one outlier a group
        lambda row: row[k // 3].fill_(float("inf")),
        lambda row: row[k // 5].fill_(float("nan")),
        lambda row: row.fill_(torch.finfo(dtype).max),
        lambda row: row[7].fill_(-torch.finfo(dtype).max),
    )
    for i in range(m):
        kinds[i % len(kinds)](x[i])
    return x


def exact(m: int, k: int, dtype: torch.dtype = torch.bfloat16, *, seed: int = 0) -> torch.Tensor:
    """[m, k] small integers over 8: every sum of their squares is exact in fp32, in any order."""
    generator = torch.Generator().manual_seed(seed + m + k)
    return (torch.randint(-24, 25, (m, k), generator=generator) / 8).to(dtype)


def weights(k: int, dtype: torch.dtype = torch.bfloat16, *, seed: int = 0) -> torch.Tensor:
    """[k] norm weights around one, some negative."""
    generator = torch.Generator().manual_seed(seed + k)
    return (torch.randn(k, generator=generator) * 0.5 + 1).to(dtype)
