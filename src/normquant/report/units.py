"""Numbers with their units, as people read them."""

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
