"""An audit as text, and as annotations of a GitHub workflow."""

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from normquant.report import formatting
from normquant.report.formatting import shorten, table

Report = Mapping[str, Any]
_NAME_WIDTHS = 16, 28, 56  # the least, the least beside a column of findings, the most
WIDTH = 110  # of all text, where nothing says how wide it may be
_GITHUB_LEVELS = {"error": "error", "warning": "warning", "note": "notice"}


def render(reports: Sequence[Report], title: str, width: int = WIDTH) -> str:
    """One audit, or the same code at several sizes: a summary, then the launches and findings of each.

    width: of lines; names are shortened and prose is wrapped, and only a table with too many columns is wider.
    """
    parts = []
    if len(reports) > 1:
        parts.append(f"{title}, for {reports[0]['target']}\n\n{summary(reports)}")
    parts.extend(one(report, title, width) for report in reports)
    return "\n\n".join(parts) + "\n"


def summary(reports: Sequence[Report]) -> str:
    """A line per size."""
    rows = [
        [
            sizes(report) or "-",
            str(len(report["kernels"])),
            str(opaque_calls(report)),
            formatting.size(report["bytes"]),
            formatting.size(report["wasted_bytes"]),
            formatting.microseconds(report["est_us"]),
            str(len(report["findings"])),
        ]
        for report in reports
    ]
    header = ["sizes", "kernels", "opaque", "DRAM", "wasted", "est. us", "findings"]
    return table(header, rows, "<>>>>>>")


def one(report: Report, title: str, width: int = WIDTH) -> str:
    """Heading, launches, findings, notes."""
    parts = [heading(report, title, width)]
    for program in report["programs"]:
        name = f"{program['name']}\n" if len(report["programs"]) > 1 else ""
        parts.append(name + launches(program, report, width))
    parts.append(findings(report, width))
    parts.extend(_remarks(report, width))
    return "\n\n".join(part for part in parts if part)


def heading(report: Report, title: str, width: int = WIDTH) -> str:
    wasted = report["wasted_bytes"]
    part = wasted / report["bytes"] if report["bytes"] else 0.0
    rules = Counter(finding["rule"] for finding in report["findings"])
    by_rule = ", ".join(f"{count} {rule}" for rule, count in rules.items())
    lines = [
        ", ".join(filter(None, [f"{title}, for {report['target']}", sizes(report)])),
        f"{formatting.count(len(report['kernels']), 'generated kernel')}, "
        f"{formatting.count(opaque_calls(report), 'opaque call')}, "
        f"{formatting.size(report['bytes'])} through DRAM, about {formatting.microseconds(report['est_us'])} us"
        " (every launch, and its bytes at copy speed)",
        f"{formatting.count(len(report['findings']), 'finding')}"
        + (f": {by_rule}; {formatting.size(wasted)} wasted ({formatting.share(part)})" if by_rule else ""),
    ]
    return "\n".join([lines[0], *(line for text in lines[1:] for line in _wrapped(text, width, "  "))])


def launches(program: Mapping[str, Any], report: Report, width: int = WIDTH) -> str:
    """Every launch in order: what it is, what it moves and, where there is room, which rules found it."""
    rows = []
    for launch in program["launches"]:
        rules = [finding["rule"] for finding in findings_at(report, program["number"], launch["position"])]
        moved = formatting.size(launch["bytes_read"]), formatting.size(launch["bytes_written"])
        time, found = formatting.microseconds(launch["est_us"]), ", ".join(dict.fromkeys(rules))
        rows.append([str(launch["position"]), launch["name"], launch["kind"], *moved, time, found])
    header = ["#", "launch", "kind", "reads", "writes", "est. us", "findings"]
    least, enough, most = _NAME_WIDTHS
    if _left(header, rows, width) < enough:
        header, rows = header[:-1], [row[:-1] for row in rows]
    letters = min(most, max(least, _left(header, rows, width)))
    return _launch_table(header, [[row[0], shorten(row[1], letters), *row[2:]] for row in rows])


def _left(header: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> int:
    """How many letters of a line are left for the name of a launch."""
    lines = _launch_table(header, [[row[0], "", *row[2:]] for row in rows]).splitlines()
    return width - max(map(len, lines), default=0) + len(header[1])


def _launch_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return table(header, rows, "><<>>><"[: len(header)], "  ")


def findings(report: Report, width: int = WIDTH) -> str:
    """Each finding with what to do about it; those that say the same about several launches together."""
    groups = grouped(report["findings"], "rule", "kernel", "message")
    return "\n\n".join(_finding(group, width) for group in groups)


def _finding(group: Sequence[Mapping[str, Any]], width: int) -> str:
    first = group[0]
    size, time = sum(f["bytes"] for f in group), sum(f["est_us"] for f in group)
    cost = f", {formatting.size(size)}, {formatting.share(sum(f['share'] for f in group))} of the bytes" if size else ""
    cost += f", about {formatting.microseconds(time)} us" if time else ""
    times = f" ({len(group)} times)" if len(group) > 1 else ""
    lines = _wrapped(f"{first['severity']}: {first['rule']} in {first['kernel']}{times}{cost}", width, "", "  ")
    lines += [*_wrapped(first["message"], width), *_wrapped(f"fix: {first['fix']}", width)]
    for origin in first["origins"][:2]:
        lines += [f"    {origin['file']}:{origin['line']}: {shorten(origin['code'], min(90, width - 20))}"]
    return "\n".join(lines)


def _wrapped(text: str, width: int, first: str = "    ", others: str = "    ") -> list[str]:
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=others, break_long_words=False, break_on_hyphens=False
    )


def _remarks(report: Report, width: int) -> list[str]:
    parts = []
    if report["notes"]:
        notes = [_wrapped(f"note: {note}", width, "", "  ") for note in report["notes"]]
        parts.append("\n".join(line for lines in notes for line in lines))
    if report["skipped"]:
        parts.append("\n".join(f"not read: {s['file']}: {s['reason']}" for s in report["skipped"]))
    return parts


def sizes(report: Report) -> str:
    """The symbolic sizes that a report is evaluated at."""
    return ", ".join(f"{name} = {size}" for name, size in report["sizes"].items())


def opaque_calls(report: Report) -> int:
    return sum(extern["count"] for extern in report["extern"])


def findings_at(report: Report, program: int, position: int) -> list[Mapping[str, Any]]:
    """The findings about one launch."""
    return [f for f in report["findings"] if (f["program"], f["position"]) == (program, position)]


def grouped(found: Sequence[Mapping[str, Any]], *keys: str) -> list[list[Mapping[str, Any]]]:
    """Findings together that are equal in `keys`, such as those that say the same about several launches."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for finding in found:
        groups.setdefault(tuple(finding[key] for key in keys), []).append(finding)
    return list(groups.values())


def github_annotations(reports: Sequence[Report]) -> str:
    """Workflow commands that GitHub shows on a pull request: one per finding, at the user's source line if known.

    The syntax is documented at docs.github.com, "Workflow commands for GitHub Actions".
    """
    lines = []
    for finding in (finding for report in reports for finding in report["findings"]):
        place = finding["origins"][0] if finding["origins"] else finding
        where = {"file": place["file"], "line": place["line"], "title": f"{finding['rule']}: {finding['kernel']}"}
        properties = ",".join(f"{name}={_property(str(value))}" for name, value in where.items() if value)
        text = f"{finding['message']}. Fix: {finding['fix']}"
        lines.append(f"::{_GITHUB_LEVELS[finding['severity']]} {properties}::{_data(text)}")
    return "\n".join(dict.fromkeys(lines))


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
