"""Example inputs of the ops, for warm-ups, benchmarks and tests."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from normquant.spec import Rope

LATENT = (512, 64)  # kv_a and k_pe beside q_a, of DeepSeek-V3
HEAD_DIM = 128  # values of a head of a gated delta net, of Qwen3-Next
POSITIONS = 4096  # rows of cos and sin
EPS = 1e-6


@dataclass(frozen=True)
class Examples:
    """Random tensors for m rows of k quantized values, always the same ones for a seed.

    latent: widths of kv_a and k_pe beside a q_a of k values. gap: values between one row of an activation and the next.
    limit: of a gated product. head_dim: values of a head that has a norm of its own.
    """

    m: int
    k: int
    device: torch.device | str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    weight_dtype: torch.dtype = torch.bfloat16
    weight_offset: float = 0.0
    latent: tuple[int, int] = LATENT
    rope: Rope = "interleaved"
    gap: int = 0
    seed: int = 0
    limit: float | None = None
    head_dim: int = HEAD_DIM

    @cached_property
    def generator(self) -> torch.Generator:
        """The source of all values; torch's own one is left alone."""
        return torch.Generator(self.device).manual_seed(self.seed)

    def rows(self, width: int) -> torch.Tensor:
        """Standard normal activations [m, width]."""
        wide = torch.randn(
            self.m, width + self.gap, generator=self.generator, device=self.device, dtype=self.dtype
        )  # [m, width + gap]
        return wide[:, :width]

    def weight(self, width: int) -> torch.Tensor:
        """Weights of a norm [width], in [0.5, 1.5)."""
        weight = torch.rand(width, generator=self.generator, device=self.device).add_(0.5)
        return weight.to(self.weight_dtype)

    def angles(self, r: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, [POSITIONS, r/2] each, the halves of one tensor as in vLLM; any values do."""
        both = torch.randn(POSITIONS, r, generator=self.generator, device=self.device, dtype=self.dtype)
        return both[:, : r // 2], both[:, r // 2 :]

    def positions(self) -> torch.Tensor:
        """Positions [m] int64."""
        return torch.randint(0, POSITIONS, (self.m,), generator=self.generator, device=self.device)
