"""The sections of the demonstration as text for a terminal, and as one self-contained HTML page."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from html import escape

from normquant.demo.sections import NEXT, Section, SectionTable
from normquant.report.formatting import table

WIDTH = 100
INDENT = "   "
_STYLE = """
:root { color-scheme: light dark; --text: #1d2329; --soft: #5b6670; --rule: #d9dee3; --back: #fff; --code: #f3f5f7; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e9ec; --soft: #9aa5af; --rule: #39424b; --back: #14181c; --code: #20262c; }
}
body { margin: 2.5rem auto; max-width: 62rem; padding: 0 1.25rem; background: var(--back); color: var(--text);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .25rem; }
p { margin: .4rem 0 1rem; }
.lead, li { color: var(--soft); }
.verdict { font-size: 1.1rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .35rem 1.6rem .35rem 0; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--rule); }
th { color: var(--soft); font-weight: 600; }
.right { text-align: right; }
.sum td { font-weight: 600; border-bottom: 0; }
code { background: var(--code); padding: .15rem .4rem; border-radius: .3rem; font-size: .9em; overflow-wrap: anywhere; }
ul { padding-left: 1.2rem; }
dt { margin-top: .6rem; }
dd { margin: .2rem 0 0; }
footer { margin-top: 2.5rem; color: var(--soft); }
"""


def as_text(found: Sequence[Section], verdict: str, seconds: float) -> str:
    """All sections, the verdict and what to type next."""
    parts = [_text_section(section) for section in found]
    parts.append(_paragraph(f"{verdict} ({seconds:.0f} s)", "", ""))
    width = max(len(what) for what, _ in NEXT)
    parts.append("Next\n" + "\n".join(f"{INDENT}{what:<{width}}   {command}" for what, command in NEXT))
    return "\n\n".join(parts) + "\n"


def _text_section(section: Section) -> str:
    parts = [section.title, _paragraph(section.lead, INDENT, INDENT)]
    parts += ["", *(f"{_text_table(t)}\n" for t in section.tables)] if section.tables else []
    parts += [_paragraph(note, f"{INDENT}- ", f"{INDENT}  ") for note in section.notes]
    return "\n".join(parts)


def _paragraph(text: str, first: str, following: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent=first, subsequent_indent=following, break_long_words=False)


def _text_table(t: SectionTable) -> str:
    lines = table(t.header, t.rows, t.align, INDENT).splitlines()
    if t.footer:
        lines.insert(-1, lines[1])  # the rule under the header once more
    return "\n".join(lines)


def as_html(found: Sequence[Section], verdict: str, made_by: str) -> str:
    """The page; it loads nothing from anywhere. made_by: versions, for the foot of the page."""
    title = "normquant demo: a DeepSeek-V3 layer, before and after"
    following = "".join(f"<dt>{escape(what)}</dt><dd><code>{escape(command)}</code></dd>" for what, command in NEXT)
    body = "".join(map(_html_section, found))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f'<body><main><h1>{escape(title)}</h1><p class="verdict">{escape(verdict)}</p>\n{body}'
        f"<section><h2>Next</h2><dl>{following}</dl></section></main>\n"
        f"<footer>{escape(made_by)}</footer></body></html>\n"
    )


def _html_section(section: Section) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in section.notes)
    return (
        f'<section><h2>{escape(section.title)}</h2><p class="lead">{escape(section.lead)}</p>\n'
        + "".join(map(_html_table, section.tables))
        + (f"<ul>{notes}</ul>" if notes else "")
        + "</section>\n"
    )


def _html_table(t: SectionTable) -> str:
    classes = [' class="right"' if align == ">" else "" for align in t.align]
    head = "".join(f'<th scope="col"{c}>{escape(cell)}</th>' for c, cell in zip(classes, t.header, strict=True))
    rows = []
    for index, row in enumerate(t.rows):
        cells = "".join(f"<td{c}>{escape(cell)}</td>" for c, cell in zip(classes, row, strict=True))
        last = t.footer and index == len(t.rows) - 1
        rows.append(f'<tr class="sum">{cells}</tr>' if last else f"<tr>{cells}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>\n'
