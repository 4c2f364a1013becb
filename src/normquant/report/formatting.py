"""Numbers with their units, names and tables as text."""

from collections.abc import Sequence

_STEPS = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))


def size(count: float) -> str:
    """Bytes: `0 B`, `28.0 KiB`, `1.75 MiB`."""
    for unit, step in _STEPS:
        if abs(count) >= step:
            number = count / step
            return f"{number:.{0 if abs(number) >= 100 else 1 if abs(number) >= 10 else 2}f} {unit}"
    return f"{count:.0f} B"


def microseconds(time: float) -> str:
    """`0.9`, `12.3`, `1687`: microseconds to about three digits."""
    return f"{time:.0f}" if abs(time) >= 100 else f"{time:.1f}"


def share(part: float) -> str:
    """A part of one as a percentage."""
    return f"{100 * part:.1f} %"


def count(number: int, noun: str, plural: str = "") -> str:
    """`1 kernel`, `4 kernels`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}".replace(",", " ")


def signed(text: str, positive: bool) -> str:
    return f"+{text}" if positive else text


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
    tail = (width - 3) // 2
    return f"{text[: width - 3 - tail]}...{text[len(text) - tail :]}"
