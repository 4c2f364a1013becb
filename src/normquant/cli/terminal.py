"""How wide text may be."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap

NARROWEST = 40


def columns() -> int | None:
    """COLUMNS, or the width of the terminal that stdout is; None where it is a pipe or a file: a line is one line."""
    if os.environ.get("COLUMNS", "").isdigit() or (sys.stdout and sys.stdout.isatty()):
        return max(NARROWEST, shutil.get_terminal_size().columns)
    return None


def wrapped(line: str, indent: str = "") -> str:
    """A line in the width of the terminal, `indent` before all but the first part. Words stay whole."""
    width = columns()
    if width is None or len(line) <= width:
        return line
    indent = indent if len(indent) < width // 2 else "    "
    return textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
