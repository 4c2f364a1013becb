"""The files that `normquant audit` writes: a page, and JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from normquant.cli.output_files import write_atomically


def write_page(
    path: str, reports: Sequence[Sequence[Mapping[str, Any]]], title: str, names: Sequence[str] | None = None
) -> None:
    """The page of one report for each set of sizes, or of two of each with their names."""
    from normquant.report.page import html

    shown = html.Compared(reports, names or (html.SINGLE,))
    write_atomically(Path(path), html.page(shown, title))
    print(f"page: {path}", file=sys.stderr)


def write_json(path: str, data: Sequence[Mapping[str, Any]]) -> None:
    """One audit as an object, several as a list; "-" is the terminal."""
    text = json.dumps(data[0] if len(data) == 1 else data, indent=2)
    if path == "-":
        print(text)
    else:
        write_atomically(Path(path), text + "\n")
