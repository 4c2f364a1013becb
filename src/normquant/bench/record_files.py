"""Records as JSON lines, one a line: written, read, and checked against their schema."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from normquant.bench.records import SUITES, TIMES, Provenance, RanksRecord, Record


@contextlib.contextmanager
def writing(path: Path | None) -> Iterator[Callable[[Iterable[Record]], None]]:
    """A function that appends records to `path`.part, which becomes `path` at the end; None writes nothing.

    What was measured before an interruption stays in the .part file, and `path` stays as it was; so it does where
    nothing was measured at all.
    """
    if path is None:
        yield lambda records: None
        return
    part = path.with_suffix(path.suffix + ".part")
    try:
        with part.open("w") as file:

            def add(records: Iterable[Record]) -> None:
                file.writelines(json.dumps(_figures_first(r)) + "\n" for r in records)
                file.flush()

            yield add
        if part.stat().st_size:
            os.replace(part, path)
    finally:
        if part.exists() and not part.stat().st_size:
            part.unlink()


def _figures_first(record: Record) -> dict[str, Any]:
    """The fields of a record as they are written, those of the provenance at the end."""
    values = asdict(record)
    for own in fields(Provenance):
        values[own.name] = values.pop(own.name)
    return values


def read(path: Path, needed: Iterable[str] = ()) -> Iterator[dict]:
    """The records of a file.

    needed: names of fields; each that a record's suite has must be there, of its type, and a time above zero.
    Raises ValueError naming the line that is no such record.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not JSON lines, but bytes that are no UTF-8") from None
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line, parse_constant=_no_number)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not JSON: {getattr(error, 'msg', error)}") from None
        if not isinstance(record, dict) or not isinstance(record.get("suite"), str):
            raise ValueError(f"{path}:{number}: not a record: it has no 'suite'")
        if needed and (found := _unusable(record, needed)):
            raise ValueError(f"{path}:{number}: not a usable record: {found[0]}")
        yield record


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _unusable(record: dict, needed: Iterable[str]) -> list[str]:
    if record["suite"] not in SUITES:
        return [_unknown_suite(record)]
    types = _types(record)
    wanted = {name: types[name] for name in needed if name in types}
    return _mistyped(record, wanted) or [f"{n} is {record[n]}" for n in wanted if n in TIMES and record[n] <= 0]


def problems(record: dict) -> list[str]:
    """What is wrong with a record: fields missing, unknown or mistyped, figures that contradict each other."""
    if record["suite"] not in SUITES:
        return [_unknown_suite(record)]
    types = _types(record)
    found = _missing(record, types)
    found += [f"unknown {name}" for name in record if name not in types]
    return found or _mistyped(record, types) or _contradictions(record)[:1]


def _contradictions(record: dict) -> list[str]:
    name = next(name for name in TIMES if name in record)
    us, found = record[name], []
    if not record["us_p10"] <= us <= record["us_p90"]:
        found.append(f"{name} is outside of us_p10 .. us_p90")
    if "classes" in record and abs(sum(record["classes"].values()) - us) > 0.03 * us:
        found.append(f"classes do not add up to {name}")
    if "gbps" in record and abs(record["bytes"] / us / 1e3 - record["gbps"]) > 0.01 * record["gbps"] + 0.1:
        found.append("gbps is not bytes / us")
    return found


def _unknown_suite(record: dict) -> str:
    return f"unknown suite {record['suite']!r}; known: {', '.join(SUITES)}"


def _types(record: dict) -> dict[str, Any]:
    return {f.name: f.type for f in fields(_kind(record))}


def _kind(record: dict) -> type[Record]:
    return RanksRecord if "ranks" in record else SUITES[record["suite"]]


def _mistyped(record: dict, types: Mapping[str, Any]) -> list[str]:
    return _missing(record, types) or [
        f"{n} is {record[n]!r}" for n, t in types.items() if n in record and not _is(t, record[n])
    ]


def _missing(record: dict, types: Mapping[str, Any]) -> list[str]:
    """Fields that later versions added have a default: older records lack them."""
    needed = [f.name for f in fields(_kind(record)) if f.default is MISSING and f.default_factory is MISSING]
    return [f"missing {name}" for name in types if name not in record and name in needed]


def _is(name: Any, value: object) -> bool:
    """Whether a value out of JSON is of the type that a field names."""
    if name.startswith("dict"):
        of = name.removeprefix("dict[str, ").removesuffix("]")
        return isinstance(value, dict) and all(isinstance(k, str) and _is(of, v) for k, v in value.items())
    types: dict[str, tuple[type, ...]] = {
        "str": (str,),
        "int": (int,),
        "bool": (bool,),
        "float": (int, float),
        "float | None": (int, float, type(None)),
    }
    if isinstance(value, bool):  # which is an int to Python
        return name == "bool"
    return isinstance(value, types[name]) and not (isinstance(value, float) and not math.isfinite(value))
