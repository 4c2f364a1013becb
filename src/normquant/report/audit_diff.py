"""Two audits compared: launches and bytes that were added and removed, by what they come from."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from normquant.report import formatting
from normquant.report.audit_text import Report, findings_at, opaque_calls, sizes
from normquant.report.formatting import shorten, table

_COPIES = ("identity", "layout-copy", "mutated-input-copy", "cast-round-trip")
_NUMBER = re.compile(r"_\d+$")


@dataclass(frozen=True)
class LaunchChange:
    """The launches of one origin before and after: how many, their bytes, and their estimated time."""

    origin: str
    kind: str
    count: tuple[int, int]
    bytes: tuple[int, int]
    est_us: tuple[float, float]


def changes(before: Report, after: Report) -> list[LaunchChange]:
    """The origins whose launches differ, largest difference in time first."""
    sides = [_by_origin(before), _by_origin(after)]
    found = []
    for kind, origin in dict.fromkeys([*sides[0], *sides[1]]):
        a, b = (side.get((kind, origin), []) for side in sides)
        times = sum(x["est_us"] for x in a), sum(x["est_us"] for x in b)
        change = LaunchChange(origin, kind, (len(a), len(b)), (_bytes(a), _bytes(b)), times)
        if change.count[0] != change.count[1] or change.bytes[0] != change.bytes[1]:
            found.append(change)
    return sorted(found, key=lambda c: (-abs(c.est_us[1] - c.est_us[0]), c.origin))


def _by_origin(report: Report) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for program in report["programs"]:
        for launch in program["launches"]:
            found.setdefault((launch["kind"], _origin(launch, report, program)), []).append(launch)
    return found


def _origin(launch: Mapping[str, Any], report: Report, program: Mapping[str, Any]) -> str:
    """What a launch comes from: an opaque operator, a needless copy, or the graph operations in a kernel."""
    if launch["kind"] == "extern":
        return str(launch["name"])
    for finding in findings_at(report, program["number"], launch["position"]):
        if finding["rule"] in _COPIES:
            what = finding["message"].partition(" because ")[0].partition("copies ")[2]
            return f"{finding['rule']} of {what or launch['name']}"
    if launch["aten"]:
        return " ".join(dict.fromkeys(name.removeprefix("aten.") for name in launch["aten"]))
    return _NUMBER.sub("", launch["name"])


def _bytes(launches: Sequence[Mapping[str, Any]]) -> int:
    return sum(launch["bytes_read"] + launch["bytes_written"] for launch in launches)


def rule_counts(before: Report, after: Report) -> list[tuple[str, int, int]]:
    """(rule, findings before, findings after) for every rule that has findings."""
    rules = dict.fromkeys(f["rule"] for report in (before, after) for f in report["findings"])
    return [(rule, _count(before, rule), _count(after, rule)) for rule in rules]


def _count(report: Report, rule: str) -> int:
    return sum(finding["rule"] == rule for finding in report["findings"])


def to_dict(before: Report, after: Report) -> dict[str, Any]:
    """The differences as plain data."""
    counts = {rule: [a, b] for rule, a, b in rule_counts(before, after)}
    return {"changes": [asdict(change) for change in changes(before, after)], "findings": counts}


def render(before: Report, after: Report, names: tuple[str, str]) -> str:
    """The differences as text."""
    where = ", ".join(filter(None, [after["target"], sizes(after)]))
    parts = [f"before: {names[0]}\nafter:  {names[1]}\nfor {where}", _totals(before, after)]
    listed = [_row(change) for change in changes(before, after)]
    header = ["", "origin", "kind", "launches", "DRAM", "change", "est. us"]
    parts.append(table(header, listed, "<<<>>>>") if listed else "the same launches with the same bytes")
    counts = [[rule, *_counts(a, b)] for rule, a, b in rule_counts(before, after)]
    if counts:
        parts.append(table(["findings", "before", "after", "change"], counts, "<>>>"))
    return "\n\n".join(parts) + "\n"


def _totals(before: Report, after: Report) -> str:
    rows = [
        ["generated kernels", *_counts(len(before["kernels"]), len(after["kernels"]))],
        ["opaque calls", *_counts(opaque_calls(before), opaque_calls(after))],
        ["DRAM", *_pair(before["bytes"], after["bytes"], formatting.size)],
        ["wasted", *_pair(before["wasted_bytes"], after["wasted_bytes"], formatting.size)],
        ["est. us", *_pair(before["est_us"], after["est_us"], formatting.microseconds)],
    ]
    return table(["", "before", "after", "change"], rows, "<>>>")


def _pair(a: float, b: float, form: Any) -> list[str]:
    return [form(a), form(b), formatting.signed(form(b - a), b > a) if a != b else "="]


def _row(change: LaunchChange) -> list[str]:
    (launches, launches_after), (size, size_after), (time, time_after) = change.count, change.bytes, change.est_us
    return [
        "+" if not launches else "-" if not launches_after else "~",
        shorten(change.origin, 70),
        change.kind,
        f"{launches} -> {launches_after}",
        f"{formatting.size(size)} -> {formatting.size(size_after)}",
        formatting.signed(formatting.size(size_after - size), size_after > size),
        formatting.signed(formatting.microseconds(time_after - time), time_after > time),
    ]


def _counts(before: int, after: int) -> list[str]:
    return [str(before), str(after), f"{after - before:+d}" if after != before else "="]
