"""How several commands read their arguments."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

POLICIES = ("auto", "always", "never", "native", "opaque-norm")  # of normquant.compile.policy, which imports torch
PRODUCTS = ("auto", "always", "never")  # of the same


def completing(action: argparse.Action, names: Iterable[str]) -> None:
    """Have a shell that completes a command line offer these for an option that accepts others, too."""
    offered = list(names)
    action.completer = lambda **given: offered  # type: ignore[attr-defined]  # what argcomplete looks for


def integers(text: str) -> tuple[int, ...]:
    """'1,64' -> (1, 64), an argparse type."""
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of integers; 1,64,1024 is one") from None
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: sizes start at 1")
    return values


def chosen(text: str | None, known: Iterable[str], what: str) -> list[str]:
    """'a,b' -> ["a", "b"], all that are known for None; raises ValueError for a name that is not known."""
    names = text.split(",") if text else list(known)
    if unknown := set(names) - set(known):
        raise ValueError(f"unknown {what} {', '.join(sorted(unknown))}; accepted: {', '.join(known)}")
    return names
