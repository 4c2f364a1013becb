"""Gradients: no op has one, because fp8 outputs cannot carry it; a call that would lose one is refused.

`normquant.linear.straight_through` has the gradient of a layer that quantizes its input itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

INSTEAD = (
    "Call it under torch.no_grad(), or, to train, give BlockFP8Linear the unquantized activation: the gradient passes "
    "straight through its quantization"
)


def refuse_gradients(name: str, args: Iterable[Any]) -> None:
    """Raise RuntimeError if one of the arguments of op `name` requires grad and gradients are recorded."""
    if torch.is_grad_enabled() and any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args):
        raise RuntimeError(f"{name} has no gradient, and an argument requires grad. {INSTEAD}")
