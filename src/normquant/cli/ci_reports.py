"""The files that CI servers read: an audit's findings as SARIF, checks as JUnit XML."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from normquant.audit import AuditReport, expectations
from normquant.audit.rules import RULES
from normquant.cli.output_files import write_atomically
from normquant.report import audit_sarif, junit
from normquant.report.junit import JUnitCase
from normquant.version import VERSION


def write(
    args: argparse.Namespace,
    data: Sequence[Mapping[str, Any]],
    made: Sequence[AuditReport],
    expected: Mapping[str, int],
) -> None:
    """Write what was asked for."""
    if args.sarif:
        rules = [
            {"id": rule.id, "severity": rule.severity, "description": (rule.find.__doc__ or rule.id).splitlines()[0]}
            for rule in RULES
        ]
        write_atomically(args.sarif, audit_sarif.render(data, rules, VERSION, Path.cwd()) + "\n")
    if args.junit:
        checks = expectations.check(made, args.fail_on, expected, args.max_bytes)
        cases = [JUnitCase(args.what, one.name, one.failures) for one in checks]
        write_junit(args.junit, "normquant audit", cases)


def write_junit(path: Path, suite: str, cases: Sequence[JUnitCase]) -> None:
    """Write checks, made now, as JUnit XML."""
    now = datetime.datetime.now().replace(microsecond=0)
    write_atomically(path, junit.render(suite, cases, now.isoformat()))
