"""`normquant compare before.jsonl after.jsonl`: what got slower, what got faster, and whether that fails the build."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from normquant.bench.records import read

# What makes two records the same case, of whatever suite; the other fields were measured, or are versions.
CASE = (
    *("suite", "op", "model", "setting", "linear", "layers", "moe", "batch", "m", "k"),
    *("group", "layout", "scale", "residual", "normed", "provider", "inputs", "policy", "gpu"),
)


@dataclass(frozen=True)
class Change:
    """One case in both files. ratio: after / before, above 1 is slower; separate: the two p10..p90 do not overlap."""

    case: str
    before_us: float
    after_us: float
    separate: bool

    @property
    def ratio(self) -> float:
        """after / before."""
        return self.after_us / self.before_us


def key(record: dict) -> tuple:
    """What makes two records the same case."""
    return tuple(str(record.get(name)) for name in CASE)


def us(record: dict) -> float:
    """What a record measured: a call, or a step of vLLM on the GPU."""
    return record["us"] if "us" in record else record["gpu_us_per_step"]


def compare(before: Iterable[dict], after: Iterable[dict]) -> tuple[list[Change], int, int]:
    """The cases in both, and how many are only in `before` and only in `after`."""
    old, new = ({key(r): r for r in records} for records in (before, after))
    changes = [change(old[k], new[k]) for k in old if k in new]
    return changes, len(old.keys() - new.keys()), len(new.keys() - old.keys())


def change(before: dict, after: dict) -> Change:
    """The change between two records of one case."""
    low, high = sorted((before, after), key=us)
    separate = low.get("us_p90", us(low)) < high.get("us_p10", us(high))
    return Change(label(before), us(before), us(after), separate)


def label(record: dict) -> str:
    """A case in a few words."""
    words = [record.get(name) for name in ("provider", "setting", "linear", "op", "model") if record.get(name)]
    sizes = [f"{name}={record[name]}" for name in ("m", "k", "batch") if name in record]
    return " ".join([*map(str, words), *sizes, *(["normed"] if record.get("normed") else [])])


def percent(text: str) -> float:
    """'5%' or '5' -> 0.05, an argparse type."""
    try:
        value = float(text.removesuffix("%")) / 100
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a percentage; 5% is one") from None
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a percentage of at least 0")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `normquant compare`."""
    parser.add_argument("before", type=Path, help="records, one JSON object a line")
    parser.add_argument("after", type=Path, help="records of the same cases, measured later")
    parser.add_argument(
        "--fail-if-slower", type=percent, metavar="PCT", help="exit 1 if a case is slower by more than this"
    )
    parser.add_argument(
        "--provider", default="normquant", help="whose records to compare, or 'all' (default: normquant)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the comparison; 1 if a case got slower by more than --fail-if-slower, beyond the spread of its samples."""
    chosen = [
        [r for r in read(path) if args.provider in ("all", r.get("provider", r.get("setting")))]
        for path in (args.before, args.after)
    ]
    changes, gone, added = compare(*chosen)
    if not changes:
        raise ValueError(f"{args.before} and {args.after} have no case of provider {args.provider!r} in common")
    limit = args.fail_if_slower
    slower = [c for c in changes if limit is not None and c.separate and c.ratio > 1 + limit]
    for c in sorted(changes, key=lambda c: -c.ratio):
        if c.separate:
            mark = "  SLOWER" if c in slower else ""
            print(f"{c.ratio:6.3f}x  {c.before_us:9.2f} -> {c.after_us:9.2f} us  {c.case}{mark}")
    same = sum(not c.separate for c in changes)
    print(f"{len(changes)} cases, {same} within their samples' spread, {gone} only before, {added} only after")
    if slower:
        print(f"{len(slower)} cases are slower by more than {limit:.1%}")
    return 1 if slower else 0
