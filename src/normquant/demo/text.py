"""The demonstration as text for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from normquant.demo.sections import NEXT, Section, Table
from normquant.report.text_table import table

WIDTH = 100
INDENT = "   "


def render(found: Sequence[Section], verdict: str, seconds: float) -> str:
    """All sections, the verdict and what to type next."""
    parts = [_section(section) for section in found]
    parts.append(_paragraph(f"{verdict} ({seconds:.0f} s)", "", ""))
    width = max(len(what) for what, _ in NEXT)
    parts.append("Next\n" + "\n".join(f"{INDENT}{what:<{width}}   {command}" for what, command in NEXT))
    return "\n\n".join(parts) + "\n"


def _section(section: Section) -> str:
    parts = [section.title, _paragraph(section.lead, INDENT, INDENT)]
    parts += ["", *(f"{_table(t)}\n" for t in section.tables)] if section.tables else []
    parts += [_paragraph(note, f"{INDENT}- ", f"{INDENT}  ") for note in section.notes]
    return "\n".join(parts)


def _paragraph(text: str, first: str, following: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent=first, subsequent_indent=following, break_long_words=False)


def _table(t: Table) -> str:
    lines = table(t.header, t.rows, t.align, INDENT).splitlines()
    if t.footer:
        lines.insert(-1, lines[1])  # the rule under the header once more
    return "\n".join(lines)
