"""Methods that are replaced on an instance, and given back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def give_back(owner: Any, name: str, stock: Callable[..., Any]) -> None:
    """Undo a replacement: owner has the method again that it had when `stock` was read off it."""
    owner.__dict__.pop(name, None)
    if getattr(owner, name) != stock:  # which somebody else had put on the instance
        setattr(owner, name, stock)
