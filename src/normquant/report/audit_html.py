"""An audit as one self-contained page, which loads nothing from elsewhere and can be used with the keyboard alone."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from normquant.report import dataflow_svg, formatting
from normquant.report.audit_text import Report, findings_at, grouped, opaque_calls, sizes

_KINDS = (
    ("pointwise", "generated, pointwise"), ("reduction", "generated, reduction"),
    ("custom", "template or the user's own Triton"), ("opaque", "opaque call"),
)  # fmt: skip


def page(reports: Sequence[Report], title: str) -> str:
    """The page of one audit, or of the same code at several sizes, with a switch between them."""
    style = resources.files("normquant.report").joinpath("audit.css").read_text(encoding="utf-8")
    script = resources.files("normquant.report").joinpath("audit.js").read_text(encoding="utf-8")
    sections = "\n".join(_section(index, report, len(reports) > 1) for index, report in enumerate(reports))
    data = json.dumps([_details(report) for report in reports]).replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)} - audit for {escape(reports[0]["target"])}</title>
<style>
{style}
</style>
</head>
<body>
<a class="skip" href="#findings-0">To the findings</a>
<header>
<div><p class="eyebrow">normquant audit</p><h1>{escape(title)}</h1>
<p class="muted">What the compiler generated for {escape(reports[0]["target"])}.
Times are estimates: every launch, and its bytes at copy speed.</p></div>
<button id="theme" type="button" aria-label="Switch between light and dark">light / dark</button>
</header>
{_switch(reports)}
{sections}
<script type="application/json" id="data">{data}</script>
<script>
{script}
</script>
</body>
</html>
"""


def _switch(reports: Sequence[Report]) -> str:
    if len(reports) < 2:
        return ""
    buttons = "".join(
        f'<button type="button" data-show="{i}" aria-pressed="{str(i == 0).lower()}">{escape(sizes(report))}</button>'
        for i, report in enumerate(reports)
    )
    return f'<nav class="switch" aria-label="Sizes">{buttons}</nav>'


def _section(index: int, report: Report, several: bool) -> str:
    hidden = " hidden" if several and index else ""
    flows = "\n".join(_flow(program, report, len(report["programs"]) > 1) for program in report["programs"])
    return f"""<main class="report" data-report="{index}"{hidden}>
{_tiles(report)}
<section><h2>Data-flow</h2>
{_legend()}
<div class="split"><div class="flows">
{flows}
</div>
<aside class="panel" aria-live="polite">
<p class="muted">Choose a box: Tab or a click, arrow keys for the next, Escape to let go.</p></aside>
</div></section>
<section id="findings-{index}"><h2>Findings</h2>
{_findings(report)}
</section>
<section><h2>Launches</h2>
{_launches(report)}
</section>
{_remarks(report)}
</main>"""


def _tiles(report: Report) -> str:
    wasted = report["wasted_bytes"]
    part = formatting.share(wasted / report["bytes"]) if report["bytes"] else "0 %"
    tiles = [
        (str(len(report["kernels"])), "generated kernels"),
        (str(opaque_calls(report)), "opaque calls"),
        (formatting.size(report["bytes"]), "through DRAM"),
        (formatting.size(wasted), f"wasted, {part}"),
        (formatting.microseconds(report["est_us"]) + " us", "estimated"),
        (str(len(report["findings"])), "findings"),
    ]
    if report["sizes"]:
        tiles.insert(0, (sizes(report), "size"))
    cells = "".join(f"<div><dt>{escape(what)}</dt><dd>{escape(number)}</dd></div>" for number, what in tiles)
    return f'<dl class="tiles">{cells}</dl>'


def _legend() -> str:
    kinds = "".join(f'<li><span class="swatch {kind}"></span>{escape(text)}</li>' for kind, text in _KINDS)
    widths = "as wide as its bytes; what comes from outside at most as wide as the widest"
    return f'<ul class="legend">{kinds}<li><span class="swatch line"></span>{widths}</li></ul>'


def _flow(program: Mapping[str, Any], report: Report, several: bool) -> str:
    found = [f for f in report["findings"] if f["program"] == program["number"]]
    drawing = f'<div class="scroll">{dataflow_svg.svg(program, found)}</div>'
    if not several:
        return drawing
    opened = " open" if program["number"] == 0 else ""
    name, size = escape(program["name"]), formatting.size(program["bytes"])
    summary = f'<summary>{name} <span class="muted">{len(program["launches"])} launches, {size}</span></summary>'
    return f"<details{opened}>{summary}{drawing}</details>"


def _findings(report: Report) -> str:
    if not report["findings"]:
        return '<p class="muted">None.</p>'
    items = "".join(_finding(group) for group in grouped(report["findings"], "rule", "message"))
    return f'<ol class="findings">{items}</ol>'


def _finding(group: Sequence[Mapping[str, Any]]) -> str:
    """Findings that say the same about several launches, as one."""
    first = group[0]
    size, time = sum(f["bytes"] for f in group), sum(f["est_us"] for f in group)
    cost = [formatting.size(size), formatting.share(sum(f["share"] for f in group))] if size else []
    cost += [f"~{formatting.microseconds(time)} us"] if time else []
    links = ", ".join(
        f'<a href="#launch-{f["program"]}-{f["position"]}">{escape(f["kernel"])} (#{f["position"]})</a>' for f in group
    )
    places = "".join(
        f"<p class='origin'>{escape(str(o['file']))}:{o['line']} <code>{escape(o['code'])}</code></p>"
        for o in first["origins"][:2]
    )
    return (
        f'<li class="{escape(first["severity"])}"><p class="rule"><b>{escape(first["rule"])}</b> <span>{links}</span>'
        f'<span class="muted">{escape(" · ".join(cost))}</span></p>'
        f"<p>{escape(first['message'])}</p><p class='fix'>{escape(first['fix'])}</p>{places}</li>"
    )


def _launches(report: Report) -> str:
    rows = []
    for program in report["programs"]:
        for launch in program["launches"]:
            link = f"#launch-{program['number']}-{launch['position']}"
            moved = formatting.size(launch["bytes_read"]), formatting.size(launch["bytes_written"])
            numbers = (*moved, formatting.microseconds(launch["est_us"]))
            rows.append(
                f"<tr><td class='n'>{launch['position']}</td><td><a href='{link}'>{escape(launch['name'])}</a></td>"
                f"<td>{escape(launch['kind'])}</td>{''.join(f'<td class=n>{number}</td>' for number in numbers)}</tr>"
            )
    names = ("#", "launch", "kind", "reads", "writes", "est. us")
    head = "".join(f"<th{'' if name in ('launch', 'kind') else ' class=n'}>{name}</th>" for name in names)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def _remarks(report: Report) -> str:
    lines = [f"<li>{escape(note)}</li>" for note in report["notes"]]
    lines += [f"<li>not read: {escape(s['file'])}: {escape(s['reason'])}</li>" for s in report["skipped"]]
    return f"<section><h2>Notes</h2><ul class='notes'>{''.join(lines)}</ul></section>" if lines else ""


def _details(report: Report) -> dict[str, Any]:
    """What the panel beside the drawing shows for each launch. The page's script inserts it as text, not as markup."""
    shown = {}
    for program in report["programs"]:
        for launch in program["launches"]:
            found = findings_at(report, program["number"], launch["position"])
            shown[f"{program['number']}-{launch['position']}"] = {
                "name": launch["name"],
                "kind": launch["kind"],
                "where": f"{launch['file']}:{launch['line']}" if launch["line"] else launch["file"],
                "time": f"~{formatting.microseconds(launch['est_us'])} us",
                "reads": [_buffer(name, count, program) for name, count in launch["reads"].items()],
                "writes": [_buffer(name, count, program) for name, count in launch["writes"].items()],
                "aten": ", ".join(launch["aten"]),
                "origins": [f"{o['file']}:{o['line']}  {o['code']}" for o in launch["origins"]],
                "findings": [[f["rule"], f["message"], f["fix"]] for f in found],
            }
    return shown


def _buffer(name: str, count: int, program: Mapping[str, Any]) -> list[str]:
    held = program["buffers"].get(name)
    form = f"{held['dtype']}[{', '.join(held['shape'])}]" if held and held["dtype"] else ""
    role = held["role"] if held and held["role"] != "intermediate" else ""
    return [name, f"{form} {role}".strip(), formatting.size(count)]
