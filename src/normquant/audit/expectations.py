"""What a build expects of an audit: rules that find nothing, launches by name, at most so many bytes."""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from normquant.audit.result import AuditReport
from normquant.audit.rules import RULE_IDS

ALL_KERNELS = "kernels"  # as a name: every generated kernel


@dataclass(frozen=True)
class Expectation:
    """What is expected, in words, and how it fails: one line each, none where it holds."""

    name: str
    failures: tuple[str, ...]


def broken(
    reports: Sequence[AuditReport],
    forbidden: Sequence[str] = (),
    expected: Mapping[str, int] | None = None,
    max_bytes: int | None = None,
) -> list[str]:
    """One line per expectation that does not hold; empty when all do. Of code that launches nothing none holds."""
    checks = check(reports, forbidden, expected, max_bytes)
    return list(dict.fromkeys(line for one in checks for line in one.failures))


def check(
    reports: Sequence[AuditReport],
    forbidden: Sequence[str] = (),
    expected: Mapping[str, int] | None = None,
    max_bytes: int | None = None,
) -> list[Expectation]:
    """Every expectation, held against all reports.

    The first is that the code launches anything, without which all others would pass; `kernels` expected 0 times says
    that it need not.
    """
    found = []
    expected = expected or {}
    if (forbidden or expected or max_bytes is not None) and expected.get(ALL_KERNELS) != 0:
        found.append(_check("something is launched", reports, _launches_nothing))
    for rule in forbidden:
        found.append(_check(f"no {rule}", reports, partial(_finds, rule)))
    for name, number in expected.items():
        found.append(_check(f"{number} of {name}", reports, partial(_miscounted, name, number)))
    if max_bytes is not None:
        found.append(_check(f"at most {max_bytes} bytes through DRAM", reports, partial(_exceeds, max_bytes)))
    return found


def _check(name: str, reports: Sequence[AuditReport], fails: Callable[[AuditReport, str], list[str]]) -> Expectation:
    failures = []
    for report in reports:
        at = "".join(f" at {name} = {size}" for name, size in report.to_sizes().items()) if len(reports) > 1 else ""
        failures += fails(report, at)
    return Expectation(name, tuple(dict.fromkeys(failures)))


def _launches_nothing(report: AuditReport, at: str) -> list[str]:
    return [] if report.launches else [f"the code launches nothing{at}, so there is nothing to check"]


def _finds(rule: str, report: AuditReport, at: str) -> list[str]:
    return [f"{f.rule} in {f.kernel}{at}: {f.message}" for f in report.findings if f.rule == rule]


def _miscounted(name: str, number: int, report: AuditReport, at: str) -> list[str]:
    counted = count(report, name)
    return [] if counted == number else [f"expected {number} of {name}, the code launches {counted}{at}"]


def _exceeds(limit: int, report: AuditReport, at: str) -> list[str]:
    return [] if report.bytes <= limit else [f"{report.bytes} bytes through DRAM{at}, at most {limit} are allowed"]


def check_rules(rules: Sequence[str]) -> None:
    """Raise ValueError for an id that is not a rule's."""
    unknown = [rule for rule in rules if rule not in RULE_IDS]
    if unknown:
        raise ValueError(f"unknown rule {', '.join(unknown)}; there are {', '.join(RULE_IDS)}")


def count(report: AuditReport, name: str) -> int:
    """How many launches are called `name`, in which * and ? are wildcards.

    An opaque operator matches by its full name and by the part after its namespace: `mm` counts `aten.mm`, not
    `aten.addmm`. `kernels` counts every generated kernel.
    """
    if name == ALL_KERNELS:
        return len(report.kernels)
    names = (launch.name for launch in report.launches)
    return sum(fnmatch.fnmatchcase(n, name) or fnmatch.fnmatchcase(n.rpartition(".")[2], name) for n in names)
