"""Measured times of the three strategies, by op, K, range of rows and GPU; the files are in `tables/`.

    {"capability": "9.0", "torch": "version", "source": "command that measured it",
     "entries": [{"op": "name of an op", "k": 7168, "m": [1, 16], "us": {"fused": 1.5, "native": 3.4, "stock": 4.4}}]}

`m` is the first and the last number of rows that an entry speaks for. `us` holds at least "stock" and one other.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

Strategy = Literal["fused", "native", "stock"]


@dataclass(frozen=True)
class Entry:
    """us: microseconds of each strategy measured, for [first, last] rows of k values."""

    op: str
    k: int
    first: int
    last: int
    us: tuple[tuple[Strategy, float], ...]

    @property
    def fastest(self) -> tuple[Strategy, float]:
        return min(self.us, key=lambda item: item[1])


@dataclass(frozen=True)
class StrategyTable:
    """torch: the version whose stock and native code was measured, "" where the file does not say."""

    capability: tuple[int, int]
    source: str
    entries: tuple[Entry, ...]
    torch: str = ""

    @staticmethod
    def load(path: str) -> StrategyTable:
        """Read a table. Raises ValueError when the file is no table, OSError when it cannot be read."""
        return parse(Path(path).read_text(encoding="utf-8"), path)

    def fastest(self, op: str, k: int, m: int | None) -> tuple[Strategy, str] | None:
        """The fastest strategy and the reason, None where nothing was measured.

        m None: any number of rows may come; the answer is a strategy that is the fastest for all that were measured,
        or stock.
        """
        entries = [entry for entry in self.entries if (entry.op, entry.k) == (op, k)]
        if m is not None:
            entries = [entry for entry in entries if entry.first <= m <= entry.last]
        if not entries:
            return None
        choices = {entry.fastest[0] for entry in entries}
        times = "; ".join(f"M {e.first}..{e.last}: {', '.join(f'{s} {us:g} us' for s, us in e.us)}" for e in entries)
        if len(choices) > 1:
            return "stock", f"{self._measured}: no strategy is the fastest for every number of rows ({times})"
        return choices.pop(), f"{self._measured}: {times}"

    @property
    def _measured(self) -> str:
        return f"measured with torch {self.torch}" if self.torch else "measured"


def parse(text: str, name: str) -> StrategyTable:
    """A table from its JSON text."""
    try:
        record = json.loads(text)
        major, minor = record["capability"].split(".")
        entries = tuple(_entry(entry) for entry in record["entries"])
        return StrategyTable((int(major), int(minor)), str(record["source"]), entries, str(record.get("torch", "")))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{name} is not a table of measurements: {type(error).__name__}: {error}") from None


def _entry(record: dict[str, Any]) -> Entry:
    us = tuple((strategy, float(record["us"][strategy])) for strategy in get_args(Strategy) if strategy in record["us"])
    if len(us) < 2 or "stock" not in dict(us) or set(record["us"]) - set(get_args(Strategy)):
        raise ValueError(f"us holds {sorted(record['us'])}; 'stock' and at least one of 'fused', 'native' are needed")
    first, last = record["m"]
    return Entry(str(record["op"]), int(record["k"]), int(first), int(last), us)


@cache
def measured(capability: tuple[int, int]) -> StrategyTable | None:
    """The package's table for a GPU, None where there is none."""
    file = files("normquant.compile") / "tables" / f"sm{capability[0]}{capability[1]}.json"
    return parse(file.read_text(encoding="utf-8"), file.name) if file.is_file() else None
