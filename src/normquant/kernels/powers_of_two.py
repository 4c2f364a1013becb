"""Powers of two, which sizes on the device are."""

from __future__ import annotations


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def power_of_two_in(n: int) -> int:
    """The largest power of two that is at most n, which is at least 1."""
    return 1 << n.bit_length() - 1


def log2(n: int) -> int:
    """Base-2 logarithm of a power of two."""
    return n.bit_length() - 1
