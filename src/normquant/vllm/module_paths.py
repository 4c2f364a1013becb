"""Paths of modules in a model, as reports show them."""

from __future__ import annotations


def short(path: str) -> str:
    """A path as a compiled graph has it, without the model's own name."""
    return path.removeprefix("language_model.").removeprefix("model.")


def beside(path: str, other: str) -> str:
    """Another module's path from the layer that it has in common with the first on."""
    parts = other.split(".")
    common = next((i for i, (a, b) in enumerate(zip(path.split("."), parts, strict=False)) if a != b), 0)
    return ".".join(parts[common:])
