"""The sections of the demonstration as text for a terminal, and as one self-contained HTML page."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from normquant.demo.sections import NEXT, Section, SectionTable
from normquant.report.audit_text import Report
from normquant.report.formatting import table
from normquant.report.page import html

WIDTH = 100
INDENT = "   "
TITLE = "normquant demo: a DeepSeek-V3 layer, before and after"
SIDES = ("torch.compile", "with normquant")


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


def as_html(reports: tuple[Report, Report], found: Sequence[Section], verdict: str, made_by: str) -> str:
    """The page: the audits of both compiles side by side, and the sections; it loads nothing from anywhere.

    made_by: versions, for the foot of the page.
    """
    following = Section("Next", tables=(SectionTable(("to", "type"), NEXT, "<<"),))
    return html.page(html.Compared([reports], SIDES), TITLE, verdict, (*found, following), made_by)
