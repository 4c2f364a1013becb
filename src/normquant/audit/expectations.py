"""What a build expects of an audit: rules that find nothing, launches by name, at most so many bytes."""

import fnmatch
from collections.abc import Mapping, Sequence

from normquant.audit.result import AuditReport
from normquant.audit.rules import RULE_IDS

ALL_KERNELS = "kernels"  # as a name: every generated kernel


def broken(
    reports: Sequence[AuditReport],
    forbidden: Sequence[str] = (),
    expected: Mapping[str, int] | None = None,
    max_bytes: int | None = None,
) -> list[str]:
    """One line per expectation that does not hold; empty when all do.

    None holds of code that launches nothing, which any of them would pass; `kernels` expected 0 times says it may.
    """
    lines = []
    checked = bool(forbidden or expected or max_bytes is not None) and (expected or {}).get(ALL_KERNELS) != 0
    for report in reports:
        at = "".join(f" at {name} = {size}" for name, size in report.to_sizes().items()) if len(reports) > 1 else ""
        if checked and not report.launches:
            lines.append(f"the code launches nothing{at}, so there is nothing to check")
        for finding in report.findings:
            if finding.rule in forbidden:
                lines.append(f"{finding.rule} in {finding.kernel}{at}: {finding.message}")
        for name, number in (expected or {}).items():
            counted = count(report, name)
            if counted != number:
                lines.append(f"expected {number} of {name}, the code launches {counted}{at}")
        if max_bytes is not None and report.bytes > max_bytes:
            lines.append(f"{report.bytes} bytes through DRAM{at}, at most {max_bytes} are allowed")
    return list(dict.fromkeys(lines))


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
