"""Types of arguments that several commands have."""

from __future__ import annotations

import argparse


def integers(text: str) -> tuple[int, ...]:
    """'1,64' -> (1, 64), an argparse type."""
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of integers; 1,64,1024 is one") from None
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: sizes start at 1")
    return values
