"""What `normquant audit --diff` and `--compare-fused` print and write: two audits, at each of their sizes."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from normquant.audit import AuditReport
from normquant.cli.audit_output import write_json, write_page
from normquant.report import audit_diff


def write(
    before: Sequence[AuditReport], after: Sequence[AuditReport], names: tuple[str, str], args: argparse.Namespace
) -> None:
    """The differences as text, JSON or a page, as `args` asks. Raises ValueError for audits that are not comparable."""
    _check(before, after, names)
    pairs = [(a.to_dict(), b.to_dict()) for a, b in zip(before, after, strict=True)]
    if args.html:
        shown = [_short(name) for name in names]
        write_page(args.html, pairs, args.what or " and ".join(shown), shown)
    if args.json:
        write_json(args.json, [audit_diff.to_dict(*pair) for pair in pairs])
    if args.json != "-":
        print("\n".join(audit_diff.render(*pair, names) for pair in pairs), end="")
        if args.compare_fused:
            from normquant.compile import explain

            print(f"\n{explain()}")


def _check(before: Sequence[AuditReport], after: Sequence[AuditReport], names: tuple[str, str]) -> None:
    (one, other), counts = names, (len(before), len(after))
    if counts[0] != counts[1]:
        raise ValueError(f"{one} has {counts[0]} sets of sizes, {other} has {counts[1]}: give both the same --m")
    targets = before[0].target.name, after[0].target.name
    if targets[0] != targets[1]:
        raise ValueError(f"{one} was audited for {targets[0]}, {other} for {targets[1]}: give the same --target")


def _short(what: str) -> str:
    """How the page calls one of two: a file or folder by its name."""
    return os.path.basename(os.path.normpath(what)) if os.path.exists(what) else what
