"""The data-flow of one program as inline SVG: launches as boxes by kind, edges as wide as their bytes."""

import itertools
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from normquant.report import dataflow, formatting
from normquant.report.dataflow import BOX_HEIGHT, BOX_WIDTH, Layout, Line
from normquant.report.formatting import shorten

_WIDEST, _NARROWEST = 26.0, 1.4
_STUB = 26
_NAME_LETTERS = 34
_LAUNCHES_DRAWN = 400


def svg(program: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> str:
    """The drawing, with the findings `found` of this program. Everything that comes from the input is escaped."""
    launches = program["launches"][:_LAUNCHES_DRAWN]
    edges = [e for e in program["edges"] if e["to"] < len(launches)]
    placed = dataflow.layout(launches, edges)
    scale = _WIDEST / max((line.bytes for line in placed.lines), default=1 << 20)
    by_launch: dict[int, list[Mapping[str, Any]]] = {}
    for finding in found:
        by_launch.setdefault(finding["position"], []).append(finding)
    number = program["number"]
    parts = [
        f'<svg class="flow" role="group" aria-label="Data-flow of {escape(program["name"])}" '
        f'width="{placed.width:.0f}" height="{placed.height:.0f}" viewBox="0 0 {placed.width:.0f} {placed.height:.0f}">'
    ]
    marked = {f["buffer"] for f in found if f["severity"] != "note"}
    parts += [_edge(line, scale, number, line.buffer in marked) for line in placed.lines]
    for launch in launches:
        outside = [e for e in edges if e["to"] == launch["position"] and e["from"] is None]
        parts.append(_box(launch, placed, number, by_launch.get(launch["position"], []), outside, program, scale))
    parts.append("</svg>")
    if len(program["launches"]) > len(launches):
        parts.append(
            f'<p class="muted">The first {len(launches)} of {len(program["launches"])} launches are drawn.</p>'
        )
    return "\n".join(parts)


def _edge(line: Line, scale: float, number: int, marked: bool) -> str:
    title = f"{line.buffer}: {formatting.size(line.bytes)}"
    classes = "edge marked" if marked else "edge"
    return (
        f'<path class="{classes}" data-from="{number}-{line.source}" data-to="{number}-{line.target}" '
        f'stroke-width="{_width(line.bytes, scale):.1f}" d="{_path(line)}"><title>{escape(title)}</title></path>'
    )


def _width(count: int, scale: float) -> float:
    return min(_WIDEST, max(_NARROWEST, count * scale))


def _path(line: Line) -> str:
    first, last = line.points[0], line.points[-1]
    steps = [(line.leaves, dataflow.top(first.layer) + BOX_HEIGHT)]
    for point in line.points[1:-1]:  # straight through a layer
        steps += [(point.x, dataflow.top(point.layer)), (point.x, dataflow.top(point.layer) + BOX_HEIGHT)]
    steps.append((line.enters, dataflow.top(last.layer)))
    parts = [f"M{steps[0][0]:.1f} {steps[0][1]:.1f}"]
    for index, ((x0, y0), (x1, y1)) in enumerate(itertools.pairwise(steps)):
        middle = (y0 + y1) / 2
        curve = f"C{x0:.1f} {middle:.1f} {x1:.1f} {middle:.1f} {x1:.1f} {y1:.1f}"
        parts.append(curve if index % 2 == 0 else f"L{x1:.1f} {y1:.1f}")
    return "".join(parts)


def _box(
    launch: Mapping[str, Any],
    placed: Layout,
    number: int,
    found: Sequence[Mapping[str, Any]],
    outside: Sequence[Mapping[str, Any]],
    program: Mapping[str, Any],
    scale: float,
) -> str:
    x, y = placed.boxes[launch["position"]]
    left, upper = x - BOX_WIDTH / 2, y - BOX_HEIGHT / 2
    worst = _worst(found)
    moved = f"reads {formatting.size(launch['bytes_read'])}, writes {formatting.size(launch['bytes_written'])}"
    rules = dict.fromkeys(f["rule"] for f in found)
    label = ", ".join([launch["name"], launch["kind"], moved, *(f"finding {rule}" for rule in rules)])
    parts = [
        f'<g class="box {kind_class(launch)}{" " + worst if worst else ""}" id="launch-{number}-{launch["position"]}" '
        f'data-launch="{number}-{launch["position"]}" tabindex="0" role="button" aria-label="{escape(label)}">',
        f"<title>{escape(launch['name'])}</title>",
        _stub(left + 34, upper, outside, scale, down=False),
        _stub(left + BOX_WIDTH - 34, upper + BOX_HEIGHT, _returned(launch, program), scale, down=True),
        f'<rect x="{left:.1f}" y="{upper:.1f}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="7"/>',
        f'<rect class="stripe" x="{left:.1f}" y="{upper:.1f}" width="6" height="{BOX_HEIGHT}" rx="3"/>',
        _text(left + 16, upper + 22, "name", shorten(launch["name"], _NAME_LETTERS)),
        _text(left + 16, upper + 42, "detail", _detail(launch)),
        _badge(left + BOX_WIDTH, upper, found),
        "</g>",
    ]
    return "".join(parts)


def kind_class(launch: Mapping[str, Any]) -> str:
    """The CSS class that gives a launch its colour."""
    kind = launch["kind"]
    if kind == "extern":
        return "opaque"
    if "reduction" in kind or kind == "split_scan":
        return "reduction"
    return "pointwise" if kind in ("pointwise", "foreach") else "custom"


def _detail(launch: Mapping[str, Any]) -> str:
    time = formatting.microseconds(launch["est_us"])
    return f"{formatting.size(launch['bytes_read'])} in, {formatting.size(launch['bytes_written'])} out, ~{time} us"


def _returned(launch: Mapping[str, Any], program: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    outputs = set(program["outputs"])
    return [{"buffer": name, "bytes": count} for name, count in launch["writes"].items() if name in outputs]


def _stub(x: float, y: float, edges: Sequence[Mapping[str, Any]], scale: float, *, down: bool) -> str:
    """A short line for program inputs or results."""
    total = sum(edge["bytes"] for edge in edges)
    if not edges:
        return ""
    end = y + _STUB if down else y - _STUB
    width = _width(total, scale)
    names = ", ".join(edge["buffer"] for edge in edges)
    word = "out" if down else "in"
    return (
        f'<path class="stub" stroke-width="{width:.1f}" d="M{x:.1f} {y:.1f}V{end:.1f}"><title>{escape(names)}: '
        f"{formatting.size(total)}</title></path>"
        + _text(x + width / 2 + 5, end + (0 if down else 10), "stub-label", f"{word} {formatting.size(total)}")
    )


def _badge(x: float, y: float, found: Sequence[Mapping[str, Any]]) -> str:
    if not found:
        return ""
    rules = list(dict.fromkeys(f["rule"] for f in found))
    text = rules[0] + (f" +{len(rules) - 1}" if len(rules) > 1 else "")
    width = 7.0 * len(text) + 16
    return (
        f'<g class="badge"><rect x="{x - width + 8:.1f}" y="{y - 11:.1f}" width="{width:.1f}" height="21" rx="10.5"/>'
        + _text(x + 8 - width / 2, y + 4, "", text, anchor=True)
        + "</g>"
    )


def _worst(found: Sequence[Mapping[str, Any]]) -> str:
    severities = {f["severity"] for f in found}
    return next((severity for severity in ("error", "warning", "note") if severity in severities), "")


def _text(x: float, y: float, classes: str, text: str, anchor: bool = False) -> str:
    middle = ' text-anchor="middle"' if anchor else ""
    return f'<text class="{classes}" x="{x:.1f}" y="{y:.1f}"{middle}>{escape(text)}</text>'
