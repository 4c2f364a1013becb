"""Which kernels a block-FP8 product of few rows gets: today's, or those that split K.

Split products are chosen where a measured table of the GPU says that they are faster than the products that would run
in their place, and nowhere else:

    {"capability": "9.0", "source": "command that measured it",
     "entries": [{"part": "product", "k": 7168, "n": 2112, "m": [1, 16], "us": {"normquant": 7.9, "deepgemm": 14.2}}]}

From AUTO_ROWS rows on nothing is split, whatever the table says: between the other kernels of a layer, DeepGEMM's
products of 64 rows were no slower than the pairs that are faster alone (`normquant bench decode`).

`part` is "product" for the product alone, its sum included, or the name of the op that reads it, for both together.
`m` is the first and the last number of rows that an entry speaks for. `us` has "normquant" and at least one other.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any, Literal, get_args

import torch

from normquant.kernels.product_configs import FEW_ROWS, split_of
from normquant.ops import OPS
from normquant.spec import one_of

Wanted = Literal["auto", "always"]
Rivals = tuple[str, ...]
PRODUCT = "product"
OURS, SCALED_MM = "normquant", "scaled_mm"
AUTO_ROWS = 32
REMEDY = "`normquant tune --linear` makes them"


@dataclass(frozen=True)
class ProductChoice:
    """split: whether K is split; the product's readers then add partial sums. reason: why, or why not."""

    split: bool
    reason: str


@dataclass(frozen=True)
class Measured:
    """us: microseconds of each provider, for [first, last] rows."""

    part: str
    k: int
    n: int
    first: int
    last: int
    us: tuple[tuple[str, float], ...]

    def beside(self, rivals: Rivals) -> Measured:
        """The same with no others than these; as it is where none of them was measured."""
        us = tuple((name, us) for name, us in self.us if name == OURS or name in rivals)
        return replace(self, us=us) if len(us) > 1 else self

    @property
    def fastest(self) -> str:
        return min(self.us, key=lambda item: item[1])[0]

    @property
    def text(self) -> str:
        """The times, in words."""
        return f"M {self.first}..{self.last}: {', '.join(f'{name} {us:g} us' for name, us in self.us)}"


@dataclass(frozen=True)
class ProductTable:
    """What was measured on one kind of GPU."""

    capability: tuple[int, int]
    source: str
    entries: tuple[Measured, ...]

    def of(self, part: str, k: int, n: int) -> list[Measured]:
        """The entries of a product, or of a product and its reader."""
        return [entry for entry in self.entries if (entry.part, entry.k, entry.n) == (part, k, n)]


def choose(
    part: str, k: int, n: int, m: int, device: torch.device, wanted: Wanted = "auto", rivals: Rivals = ()
) -> ProductChoice:
    """The kernels of [m, k] by [n, k] on a device.

    rivals: the products of which one runs where none is split, by their names in the table; () for all that were
    measured. wanted: "auto" as measured; "always": split for up to 64 rows whatever was measured, in tests and to
    measure it.
    Raises ValueError for anything else.
    """
    one_of("wanted", wanted, get_args(Wanted))
    return _choose(part, k, n, m, _capability(device), wanted, rivals)


def measurement(part: str, k: int, n: int, m: int, device: torch.device) -> Measured | None:
    """What was measured for m rows on a device; None where nothing was."""
    return _speaking_for(m, _entries(part, k, n, _capability(device), ()))


def pays(part: str, k: int, n: int, device: torch.device, m: int | None = None, rivals: Rivals = ()) -> ProductChoice:
    """Whether split kernels were faster than `rivals` for m rows; m None: for some number of rows."""
    if m is not None:
        return choose(part, k, n, m, device, rivals=rivals)
    capability = _capability(device)
    entries = _entries(part, k, n, capability, rivals)
    if not entries:
        return ProductChoice(False, _lacking(part, k, n, capability))
    times = "; ".join(entry.text for entry in entries)
    few = [entry for entry in entries if entry.first < AUTO_ROWS]
    return ProductChoice(any(entry.fastest == OURS for entry in few), f"measured: {times}")


@cache
def _choose(
    part: str, k: int, n: int, m: int, capability: tuple[int, int] | None, wanted: Wanted, rivals: Rivals
) -> ProductChoice:
    if wanted == "always":
        if m <= FEW_ROWS:
            return ProductChoice(True, f"asked for; K in {split_of(k, n)} parts")
        return ProductChoice(False, f"{m} rows; split products are for {FEW_ROWS} rows at the most")
    entries = _entries(part, k, n, capability, rivals)
    if entries and m >= AUTO_ROWS:
        return ProductChoice(False, f"{m} rows; products of {AUTO_ROWS} rows and more stay what they are")
    if entry := _speaking_for(m, entries):
        return ProductChoice(entry.fastest == OURS, f"measured: {entry.text}")
    known = f"{m} rows; measured were {entries[0].first} to {entries[-1].last}" if entries else ""
    return ProductChoice(False, known or _lacking(part, k, n, capability))


def _speaking_for(m: int, entries: list[Measured]) -> Measured | None:
    return next((entry for entry in entries if entry.first <= m <= entry.last), None)


def _entries(part: str, k: int, n: int, capability: tuple[int, int] | None, rivals: Rivals) -> list[Measured]:
    table = measured(capability) if capability is not None else None
    return [entry.beside(rivals) for entry in table.of(part, k, n)] if table is not None else []


def _lacking(part: str, k: int, n: int, capability: tuple[int, int] | None) -> str:
    where = "on a CPU" if capability is None else f"on sm_{capability[0]}{capability[1]}"
    what = "the product" if part == PRODUCT else f"the product with {part}"
    remedy = f"; {REMEDY}" if part == PRODUCT or part in OPS else ""  # the tuner has one GPU, and no group
    return f"no measurements of {what} for K={k}, N={n} {where}{remedy}"


def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and not torch.version.hip else None


def parse(text: str, name: str) -> ProductTable:
    """A table from its JSON text; raises ValueError when it is none."""
    try:
        record = json.loads(text)
        major, minor = record["capability"].split(".")
        entries = tuple(_entry(entry) for entry in record["entries"])
        return ProductTable((int(major), int(minor)), str(record["source"]), entries)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{name} is not a table of products: {type(error).__name__}: {error}") from None


def _entry(record: dict[str, Any]) -> Measured:
    us = tuple((str(name), float(time)) for name, time in record["us"].items())
    if OURS not in record["us"] or len(us) < 2:
        raise ValueError(f"us holds {sorted(record['us'])}; {OURS!r} and at least one other are needed")
    first, last = record["m"]
    return Measured(str(record["part"]), int(record["k"]), int(record["n"]), int(first), int(last), us)


@cache
def measured(capability: tuple[int, int]) -> ProductTable | None:
    """The package's table for a GPU, None where there is none."""
    file = files("normquant.linear") / "tables" / f"sm{capability[0]}{capability[1]}.json"
    return parse(file.read_text(encoding="utf-8"), file.name) if file.is_file() else None
