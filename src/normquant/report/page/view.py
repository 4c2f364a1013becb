"""What the page shows of one audit or of two, as plain values for the template; numbers have become text here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from normquant.report import formatting
from normquant.report.audit_text import Report, sizes
from normquant.report.page import alignment, drawing, folding
from normquant.report.page.drawing import SideDrawing
from normquant.report.page.folding import Block
from normquant.report.page.timeline import CLASSES, PRODUCT, Step, timeline

TAIL, LONG_TAIL = 12, 26  # letters of a name that are kept where it is cut: they tell kernels and operators apart


@dataclass(frozen=True)
class Drawn:
    """One audit, or two: their drawings, and what is written around them."""

    index: int
    sizes: str
    tiles: list[tuple[str, str, str]]  # what, number, change
    bars: list[dict[str, Any]]
    width: float  # of the drawing beside the rows
    blocks: list[dict[str, Any]]
    findings: list[dict[str, Any]]
    notes: list[str]
    samples: list[tuple[str, float]]  # widths of the legend
    details: dict[str, Any]


def view(index: int, reports: Sequence[Report], names: Sequence[str]) -> Drawn:
    """Of one report, or of two."""
    sides = [timeline(report) for report in reports]
    rows = alignment.rows(sides)
    blocks = folding.blocks(rows, sides)
    size = drawing.scale(sides)
    grid = drawing.grid(rows, blocks, sides, size)
    drawn = [SideDrawing(side, rows, blocks, n, size, grid) for n, side in enumerate(sides)]
    samples = [(formatting.size(count), size.width(count)) for count in (16 << 10, 1 << 20, 16 << 20)]
    return Drawn(
        index,
        sizes(reports[-1]),
        _tiles(reports, drawn),
        _bars(drawn, names),
        max(side.width for side in drawn),
        _blocks(drawn, blocks, grid),
        [finding for n, side in enumerate(drawn) for finding in _findings(n, side)],
        list(dict.fromkeys(note for report in reports for note in _notes(report))),
        [(text, width) for text, width in samples if width <= drawing.WIDEST],
        _inspected(drawn),
    )


def _notes(report: Report) -> list[str]:
    return [*report["notes"], *(f"not read: {one['file']}: {one['reason']}" for one in report["skipped"])]


def _times(side: SideDrawing) -> list[tuple[int, Step, float]]:
    """(row, step, estimated microseconds of all its copies)."""
    counts = {row: side.blocks[side.block_of[row]].count for row in side.steps}
    return [(row, step, step.data["est_us"] * counts[row]) for row, step in side.steps.items()]


def _tiles(reports: Sequence[Report], drawn: Sequence[SideDrawing]) -> list[tuple[str, str, str]]:
    products = [sum(us for _, step, us in _times(side) if step.kind == PRODUCT) for side in drawn]
    numbers: list[tuple[str, list[float], Any]] = [
        ("launches", [len(side.timeline.steps) for side in drawn], str),
        ("generated kernels", [len(report["kernels"]) for report in reports], str),
        ("through DRAM", [report["bytes"] for report in reports], formatting.size),
        ("of that wasted", [report["wasted_bytes"] for report in reports], formatting.size),
        ("findings", [len(report["findings"]) for report in reports], str),
        ("estimated", [report["est_us"] for report in reports], _us),
        ("without matrix products", _rest(reports, products), _us),
    ]
    return [(what, _arrow([form(number) for number in found]), _change(found)) for what, found, form in numbers]


def _us(time: float) -> str:
    return f"{formatting.microseconds(time)} us"


def _arrow(texts: Sequence[str]) -> str:
    """`109 → 101 MiB`; one text where all are the same."""
    units = {text.partition(" ")[2] for text in texts}
    if len(units) == 1 and len(set(texts)) > 1:
        texts = [*(text.partition(" ")[0] for text in texts[:-1]), texts[-1]]
    return " → ".join(dict.fromkeys(texts))


def _rest(reports: Sequence[Report], products: Sequence[float]) -> list[float]:
    return [report["est_us"] - us for report, us in zip(reports, products, strict=True)]


def _change(found: Sequence[float]) -> str:
    first, last = found[0], found[-1]
    return f"{100 * (last / first - 1):+.0f} %" if first and first != last else ""


def _bars(drawn: Sequence[SideDrawing], names: Sequence[str]) -> list[dict[str, Any]]:
    """For each side the time of every launch, matrix products apart, as parts of the longer side."""
    times = [_times(side) for side in drawn]
    longest = max([sum(us for *_, us in side) for side in times]) or 1.0
    bars = []
    for number, (side, name) in enumerate(zip(times, names, strict=True)):
        groups = []
        for products in (True, False):
            held = [(row, step, us) for row, step, us in side if (step.kind == PRODUCT) == products]
            total = sum(us for *_, us in held)
            parts = [
                {"key": f"{number}-{row}", "kind": step.kind, "share": 100 * us / longest,
                 "title": f"{step.data['name']}: {formatting.microseconds(us)} us"}
                for row, step, us in held
            ]  # fmt: skip
            what = "matrix products" if products else "all other launches"
            groups.append({"what": what, "us": formatting.microseconds(total), "parts": parts})
        bars.append({"name": name, "groups": groups})
    return bars


def _blocks(drawn: Sequence[SideDrawing], blocks: Sequence[Block], grid: drawing.Grid) -> list[dict[str, Any]]:
    panels = [side.panels() for side in drawn]
    found = []
    first = 0
    for number, block in enumerate(blocks):
        rows = range(first, first + block.length)
        sides = [
            {"panel": panels[n][number], "rows": [_row(n, row, side, grid) for row in rows], "head": _head(side, rows)}
            for n, side in enumerate(drawn)
        ]
        found.append({"count": block.count, "height": grid.blocks[number], "sides": sides})
        first += block.length
    return found


def _head(side: SideDrawing, rows: range) -> str:
    """What a block that repeats is made of, on one side."""
    steps = [side.steps[row] for row in rows if row in side.steps]
    us = formatting.microseconds(sum(step.data["est_us"] for step in steps))
    return f"{formatting.count(len(steps), 'launch', 'launches')}, ~{us} us each"


def _row(number: int, row: int, side: SideDrawing, grid: drawing.Grid) -> dict[str, Any]:
    """What stands beside a box; without "name" where the side has no launch in the row."""
    place = {"key": f"{number}-{row}", "top": grid.tops[row], "height": grid.heights[row]}
    step = side.steps.get(row)
    if step is None:
        return place
    name = str(step.data["name"])
    rules = list(dict.fromkeys(f["rule"] for f in step.findings))
    worst = min((("error", "warning", "note").index(f["severity"]) for f in step.findings), default=2)
    read, written = (formatting.size(count) for count in step.bytes)
    several = len(side.timeline.report["programs"]) > 1
    return place | {
        "name": name,
        "ends": _ends(name, step),
        "kind": step.kind,
        "change": side.changes[row],
        "us": formatting.microseconds(step.data["est_us"]),
        "moved": f"{read} in, {written} out",
        "rules": rules,
        "severity": ("error", "warning", "note")[worst],
        "title": step.program["name"] if step.first and several else "",
    }


def _ends(name: str, step: Step) -> tuple[str, str]:
    """A name in two: the first part is what is cut where there is no room, of an operator its namespace."""
    short = name.rpartition(".")[2]
    tail = len(short) if step.data["kind"] == "extern" and len(short) <= LONG_TAIL else TAIL
    return name[:-tail], name[-tail:]


def _findings(number: int, side: SideDrawing) -> list[dict[str, Any]]:
    """Findings that say the same, or the same of every copy of a layer, as one."""
    groups: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    for row, step in side.steps.items():
        for finding in step.findings:
            groups.setdefault((finding["rule"], finding["message"]), {})[row] = finding
    return [_finding(number, side, group) for group in groups.values()]


def _finding(number: int, side: SideDrawing, group: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    counts = {row: side.blocks[side.block_of[row]].count for row in group}
    first = next(iter(group.values()))
    size, us, share = (sum(f[key] * counts[row] for row, f in group.items()) for key in ("bytes", "est_us", "share"))
    cost = [formatting.size(size), formatting.share(share)] if size else []
    return {
        "side": number,
        "rule": first["rule"],
        "severity": first["severity"],
        "message": first["message"],
        "fix": first["fix"],
        "times": sum(counts.values()),
        "cost": " · ".join([*cost, *([f"~{formatting.microseconds(us)} us"] if us else [])]),
        "launches": [(f"{number}-{row}", finding["kernel"]) for row, finding in group.items()],
        "origins": [f"{o['file']}:{o['line']}  {o['code']}" for o in first["origins"][:2]],
    }


def _inspected(drawn: Sequence[SideDrawing]) -> dict[str, Any]:
    """What the inspector shows: `launches` by key, and the source lines that they name by number."""
    lines: dict[tuple[str, str], int] = {}
    launches = {f"{n}-{row}": _details(row, side, lines) for n, side in enumerate(drawn) for row in side.steps}
    return {"launches": launches, "lines": list(lines)}


def _details(row: int, side: SideDrawing, lines: dict[tuple[str, str], int]) -> dict[str, Any]:
    """What is known of a launch. The page's script inserts it as text, never as markup."""
    step = side.steps[row]
    launch = step.data
    block = side.blocks[side.block_of[row]]
    each = sum(side.block_of[other] == side.block_of[row] for other in side.steps)
    return {
        "name": launch["name"],
        "kind": CLASSES[step.kind],
        "position": launch["position"],
        "count": block.count,
        "each": each,
        "time": formatting.microseconds(launch["est_us"]),
        "change": side.changes[row],
        "reads": [_buffer(name, count, step) for name, count in launch["reads"].items()],
        "writes": [_buffer(name, count, step) for name, count in launch["writes"].items()],
        "aten": ", ".join(launch["aten"]),
        "origins": [lines.setdefault((f"{o['file']}:{o['line']}", o["code"]), len(lines)) for o in launch["origins"]],
        "generated": [
            f"{launch['file']}:{launch['line']}" if launch["line"] else launch["file"],
            launch.get("code", ""),
        ],
        "findings": [[f["severity"], f["rule"], f["message"], f["fix"]] for f in step.findings],
    }


def _buffer(name: str, count: int, step: Step) -> list[str]:
    held = step.program["buffers"].get(name)
    form = f"{held['dtype']}[{', '.join(held['shape'])}]" if held and held["dtype"] else ""
    role = held["role"] if held and held["role"] != "intermediate" else ""
    return [name, f"{form} {role}".strip(), formatting.size(count)]
