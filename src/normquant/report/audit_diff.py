"""Two audits side by side: what launches and bytes came and went, by what they come from."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from normquant.report import units
from normquant.report.text_table import shorten, table

Report = Mapping[str, Any]
_COPIES = ("identity", "layout-copy", "mutated-input-copy", "cast-round-trip")
_NUMBER = re.compile(r"_\d+$")


@dataclass(frozen=True)
class LaunchChange:
    """Launches of one origin in both audits: how many, and their bytes and estimated time."""

    origin: str
    kind: str
    count: tuple[int, int]
    bytes: tuple[int, int]
    est_us: tuple[float, float]


def changes(before: Report, after: Report) -> list[LaunchChange]:
    """Origins whose launches differ, largest difference in time first."""
    held = [_by_origin(before), _by_origin(after)]
    found = []
    for key in dict.fromkeys([*held[0], *held[1]]):
        a, b = (side.get(key, []) for side in held)
        change = LaunchChange(
            key[1], key[0], (len(a), len(b)), (_bytes(a), _bytes(b)),
            (sum(x["est_us"] for x in a), sum(x["est_us"] for x in b)),
        )  # fmt: skip
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
    """What a launch comes from: an opaque call's name, else the graph operations in a kernel, else what it does."""
    if launch["kind"] == "extern":
        return str(launch["name"])
    for finding in report["findings"]:
        here = finding["program"] == program["number"] and finding["position"] == launch["position"]
        if here and finding["rule"] in _COPIES:
            what = finding["message"].partition(" because ")[0].partition("copies ")[2]
            return f"{finding['rule']} of {what or launch['name']}"
    if launch["aten"]:
        return " ".join(dict.fromkeys(name.removeprefix("aten.") for name in launch["aten"]))
    return _NUMBER.sub("", launch["name"])


def _bytes(launches: Sequence[Mapping[str, Any]]) -> int:
    return sum(launch["bytes_read"] + launch["bytes_written"] for launch in launches)


def rule_counts(before: Report, after: Report) -> list[tuple[str, int, int]]:
    """(rule, findings before, findings after) of every rule that has any."""
    rules = dict.fromkeys(f["rule"] for report in (before, after) for f in report["findings"])
    return [(rule, _count(before, rule), _count(after, rule)) for rule in rules]


def _count(report: Report, rule: str) -> int:
    return sum(finding["rule"] == rule for finding in report["findings"])


def render(before: Report, after: Report, names: tuple[str, str]) -> str:
    """The differences as text."""
    parts = [f"before: {names[0]}\nafter:  {names[1]}\nfor {after['target']}{_sizes(after)}", _totals(before, after)]
    listed = [_row(change) for change in changes(before, after)]
    header = ["", "origin", "kind", "launches", "DRAM", "change", "est. us"]
    parts.append(table(header, listed, "<<<>>>>") if listed else "the same launches with the same bytes")
    counts = [[rule, str(a), str(b), _signed(b - a)] for rule, a, b in rule_counts(before, after)]
    if counts:
        parts.append(table(["findings", "before", "after", "change"], counts, "<>>>"))
    return "\n\n".join(parts) + "\n"


def _totals(before: Report, after: Report) -> str:
    opaque = [sum(e["count"] for e in report["extern"]) for report in (before, after)]
    kernels = [len(report["kernels"]) for report in (before, after)]
    rows = [
        ["generated kernels", str(kernels[0]), str(kernels[1]), _signed(kernels[1] - kernels[0])],
        ["opaque calls", str(opaque[0]), str(opaque[1]), _signed(opaque[1] - opaque[0])],
        ["DRAM", *_pair(before["bytes"], after["bytes"], units.size)],
        ["wasted", *_pair(before["wasted_bytes"], after["wasted_bytes"], units.size)],
        ["est. us", *_pair(before["est_us"], after["est_us"], units.microseconds)],
    ]
    return table(["", "before", "after", "change"], rows, "<>>>")


def _pair(a: float, b: float, form: Any) -> list[str]:
    return [form(a), form(b), units.signed(form(b - a), b > a) if a != b else "="]


def _row(change: LaunchChange) -> list[str]:
    (launches, launches_after), (size, size_after), (time, time_after) = change.count, change.bytes, change.est_us
    return [
        "+" if not launches else "-" if not launches_after else "~",
        shorten(change.origin, 70),
        change.kind,
        f"{launches} -> {launches_after}",
        f"{units.size(size)} -> {units.size(size_after)}",
        units.signed(units.size(size_after - size), size_after > size),
        units.signed(units.microseconds(time_after - time), time_after > time),
    ]


def _signed(number: int) -> str:
    return f"{number:+d}" if number else "="


def _sizes(report: Report) -> str:
    return "".join(f", {name} = {size}" for name, size in report["sizes"].items())
