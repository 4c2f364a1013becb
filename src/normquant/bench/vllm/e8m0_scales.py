"""Whether the activation scales that reach DeepGEMM are powers of two, as it is told that they are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

# The functions of DeepGEMM as `vllm.utils.deep_gemm` holds them; each gets (data, scales) of the activation first.
ENTRIES = ("_fp8_gemm_nt_impl", "_grouped_impl", "_grouped_masked_impl")
MANTISSA = 0x7FFFFF


@dataclass
class Counts:
    """Scales seen, and those of them that are not powers of two."""

    scales: int = 0
    others: int = 0


def not_powers_of_two(scale: torch.Tensor) -> int:
    """How many scales are no power of two; int32 ones hold exponents only, which are nothing else."""
    if scale.dtype == torch.int32:
        return 0
    bits = scale.float().contiguous().view(torch.int32)
    return int(((bits & MANTISSA != 0) | (bits <= 0)).sum())  # bits <= 0: zero and what is negative


@contextlib.contextmanager
def counted() -> Iterator[Counts]:
    """Count the scales of every activation that vLLM gives to DeepGEMM meanwhile. It waits for the GPU at each call."""
    from vllm.utils import deep_gemm

    counts = Counts()
    originals = {name: getattr(deep_gemm, name, None) for name in ENTRIES}

    def wrapper(original: Any) -> Any:
        def call(activation: Any, *args: Any, **kwargs: Any) -> Any:
            scale = activation[1]
            counts.scales += scale.numel() * (4 if scale.dtype == torch.int32 else 1)
            counts.others += not_powers_of_two(scale)
            return original(activation, *args, **kwargs)

        return call

    present = {name: original for name, original in originals.items() if original is not None}
    try:
        for name, original in present.items():
            setattr(deep_gemm, name, wrapper(original))
        yield counts
    finally:
        for name, original in present.items():
            setattr(deep_gemm, name, original)
