"""Damages generated code, for the fuzz test: bytes, lines, tokens and numbers changed at random."""

from __future__ import annotations

import random
from collections.abc import Callable

_TOKENS = (
    "(", ")", "[", "]", "{", "}", ",", ":", "=", "'", '"', "'''", "\n", "    ", "#", "%", "//", "*", "**", "-", "@",
    "None", "s72", "xindex", "tl.load", "tl.store", "empty_strided_cuda", "reinterpret_tensor", "buf0", "arg0_1",
    "def call(self, args):", "99999999999999999999", "0", "-1", "lambda: ", "async_compile.triton", "\x00", "\ud800",
    "é", "\\", "if pid < num_xblocks_0:", "for r0_offset in tl.range(0, r0_numel, R0_BLOCK):", "yield ", "await ",
    "self.partitions[0]",
)  # fmt: skip


def mutated(text: str, rng: random.Random) -> str:
    """One to four random changes."""
    for _ in range(rng.randint(1, 4)):
        text = rng.choice(_CHANGES)(text, rng)
    return text


def _cut(text: str, rng: random.Random) -> str:
    return text[: rng.randrange(len(text) + 1)]


def _drop(text: str, rng: random.Random) -> str:
    at = rng.randrange(len(text) + 1)
    return text[:at] + text[at + rng.choice((1, 3, 20, 200)) :]


def _insert(text: str, rng: random.Random) -> str:
    at = rng.randrange(len(text) + 1)
    return text[:at] + rng.choice(_TOKENS) * rng.choice((1, 1, 2, 50)) + text[at:]


def _swap_lines(text: str, rng: random.Random) -> str:
    lines = text.split("\n")
    a, b = rng.randrange(len(lines)), rng.randrange(len(lines))
    lines[a], lines[b] = lines[b], lines[a]
    return "\n".join(lines)


def _repeat_lines(text: str, rng: random.Random) -> str:
    lines = text.split("\n")
    at = rng.randrange(len(lines))
    return "\n".join(lines[:at] + lines[at : at + 3] * rng.choice((2, 5)) + lines[at:])


def _replace_word(text: str, rng: random.Random) -> str:
    words = text.split(" ")
    words[rng.randrange(len(words))] = rng.choice(_TOKENS)
    return " ".join(words)


def _change_number(text: str, rng: random.Random) -> str:
    places = [i for i, letter in enumerate(text) if letter.isdigit()]
    if not places:
        return text
    at = rng.choice(places)
    return text[:at] + rng.choice(("0", "7", "-1", "9" * 30, "0.5", "s99")) + text[at + 1 :]


def _any_bytes(text: str, rng: random.Random) -> str:
    at = rng.randrange(len(text) + 1)
    return text[:at] + rng.randbytes(rng.randint(1, 8)).decode("latin-1") + text[at:]


_CHANGES: tuple[Callable[[str, random.Random], str], ...] = (
    _cut, _drop, _insert, _swap_lines, _repeat_lines, _replace_word, _change_number, _any_bytes,
)  # fmt: skip
