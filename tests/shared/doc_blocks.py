"""The fenced blocks of a page of Markdown, and the reasons that it gives for those that cannot run."""

from __future__ import annotations

import re
from dataclasses import dataclass

_BLOCK = re.compile(r"(?:^<!-- not run: (?P<why>.+?) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """language: of the fence, "" for none. not_run: the page's reason, "" where it runs. line: of the page."""

    language: str
    code: str
    not_run: str
    line: int


def of(page: str) -> list[Block]:
    """All blocks of a page's text."""
    found = []
    for match in _BLOCK.finditer(page):
        line = page.count("\n", 0, match.start("code"))
        found.append(Block(match["language"], match["code"], match["why"] or "", line))
    return found
