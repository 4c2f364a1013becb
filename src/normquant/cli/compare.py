"""Compare two files of records: what got slower, what got faster, and whether that fails the build."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from normquant.bench.comparison import NEEDED, CaseChange, compare
from normquant.bench.record_files import read
from normquant.cli.output_files import check_writable


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
        "--junit", type=Path, metavar="PATH", help="every case as a test in JUnit XML, failed where it is slower"
    )
    parser.add_argument(
        "--provider", default="normquant", help="whose records to compare, or 'all' (default: normquant)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the comparison; 1 if a case got slower by more than --fail-if-slower, beyond the spread of its samples."""
    check_writable(args.junit)
    if args.junit and args.fail_if_slower is None:
        raise ValueError("--junit writes what is checked: give --fail-if-slower as well")
    before, after = (_of_provider(path, args.provider) for path in (args.before, args.after))
    changes, gone, added = compare(before, after)
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
    if args.junit:
        _write_junit(args, changes, slower)
    if slower:
        print(f"{len(slower)} cases are slower by more than {limit:.1%}")
    return 1 if slower else 0


def _write_junit(args: argparse.Namespace, changes: Sequence[CaseChange], slower: Sequence[CaseChange]) -> None:
    from normquant.cli import ci_reports

    def failures(c: CaseChange) -> list[str]:
        times, limit = f"{c.before_us:.2f} -> {c.after_us:.2f} us", f"{args.fail_if_slower:.1%}"
        return [f"{times}, {c.ratio - 1:.1%} slower; at most {limit} is accepted"] if c in slower else []

    cases = [ci_reports.JUnitCase("normquant bench", c.case, failures(c)) for c in changes]
    ci_reports.write_junit(args.junit, f"normquant compare {args.before} {args.after}", cases)


def _of_provider(path: Path, provider: str) -> list[dict]:
    return [r for r in read(path, NEEDED) if provider in ("all", r.get("provider", r.get("setting")))]
