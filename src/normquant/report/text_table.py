"""Aligned text tables."""

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]], align: str, indent: str = "") -> str:
    """Columns under a header, aligned as `align` says: one of < and > per column. Two spaces between columns."""
    if not rows:
        return ""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(indent + _line(line, widths, align) for line in lines)


def _line(cells: Sequence[str], widths: Sequence[int], align: str) -> str:
    return "  ".join(f"{c:{a}{w}}" for c, w, a in zip(cells, widths, align, strict=True)).rstrip()


def shorten(text: str, width: int) -> str:
    """The text with its middle left out where it is longer than `width`: the ends tell names apart."""
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}"
