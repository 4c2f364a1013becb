"""Equality to the bit, and how far from it."""

from __future__ import annotations

import torch

INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def bits(t: torch.Tensor) -> torch.Tensor:
    """The bits of t as integers; every NaN becomes the same pattern, since hardware is free to choose one."""
    if t.dtype.is_floating_point:
        t = torch.where(t.float().isnan(), torch.full((), float("nan"), dtype=t.dtype, device=t.device), t)
    return t.contiguous().view(INTEGER[t.element_size()])


def assert_bitwise(got, expected) -> None:
    """Both are sequences of tensors (or None), equal in dtype, shape, stride and every bit."""
    assert len(got) == len(expected)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        if a is None or b is None:
            assert a is b, f"output {i}: {a} is not {b}"
            continue
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride()), (
            f"output {i}: {_meta(a)} is not {_meta(b)}"
        )
        differ = (bits(a) != bits(b)).nonzero()
        assert not len(differ), f"output {i}: {len(differ)} of {a.numel()} differ, first at {differ[0].tolist()}"


def pad_rows(scale: torch.Tensor, rows: int) -> torch.Tensor:
    """The rows of padding behind a column-major scale tensor."""
    whole = scale.as_strided((rows, scale.shape[1]), scale.stride())
    return whole[scale.shape[0] :]


def _meta(t: torch.Tensor) -> str:
    return f"{t.dtype} {tuple(t.shape)} stride {t.stride()}"
