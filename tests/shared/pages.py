"""Parts of a page of the docs, to compare them with what they quote."""

from __future__ import annotations

import re


def section(page: str, title: str) -> str:
    """What stands under a heading of a page, up to the next heading."""
    found = re.search(rf"^##+ {re.escape(title)}\n(.*?)(?=^##|\Z)", page, re.M | re.S)
    assert found, f"there is no section {title!r}"
    return found[1]


def words(text: str) -> str:
    """The text without line breaks."""
    return " ".join(text.split())


def table(text: str) -> list[str]:
    """The lines of the table in a text, without its rule."""
    return [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|---")]


def row(*cells: object) -> str:
    """A line of a table."""
    return f"| {' | '.join(map(str, cells))} |"
