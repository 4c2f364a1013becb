"""What all plots share: type, colours for light and dark, the line about where records come from, and the file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind people tell apart
BLUE, VERMILION, ORANGE, GREEN, PURPLE, SKY, GREY = (
    *("#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#7F7F7F"),
)
INK, MUTED = "#1b1f24", "#5d6570"
# colour -> the one that a reader with a dark page sees
DARK = {
    INK: "#e5e8ec", MUTED: "#98a1ad", BLUE: "#4aa3df", VERMILION: "#f07f3c", ORANGE: "#f2b33d", GREEN: "#2fc79b",
    PURPLE: "#dd93bb", SKY: "#7cc6f0", GREY: "#969da6",
}  # fmt: skip
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "normquant",  # the same records give the same file
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": MUTED,
    "grid.linewidth": 0.4,
    "grid.alpha": 0.35,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@contextlib.contextmanager
def figure(width: float, height: float, records: Sequence[Mapping[str, Any]], date: str) -> Iterator[Figure]:
    """A figure of so many inches, above a line that says where its records were measured."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=(width, height), layout="constrained")
        yield drawing
        drawing.supxlabel(caption(records, date), x=0.01, ha="left", fontsize=7.5, color=MUTED)


def caption(records: Sequence[Mapping[str, Any]], date: str) -> str:
    """The GPUs, versions and dates of records; `date` is for those that do not have one."""
    gpus = sorted({str(r["gpu"]) for r in records})
    versions = [_each("torch", records), _each("triton", records)]
    dates = sorted({str(d) for r in records if (d := r.get("date") or date)})
    measured = f"measured {dates[0]}" + (f" to {dates[-1]}" if len(dates) > 1 else "") if dates else ""
    return "; ".join(filter(None, [", ".join(gpus), ", ".join(versions), measured]))


def _each(name: str, records: Sequence[Mapping[str, Any]]) -> str:
    versions = sorted({str(r[name]).partition("+")[0] for r in records})
    return f"{name} {' and '.join(versions)}"


def save(drawing: Figure, path: Path) -> None:
    """Write the drawing; the suffix says the format.

    An SVG is for light and dark pages, and the same records give the same file.
    """
    import matplotlib

    svg = path.suffix == ".svg"
    with matplotlib.rc_context(STYLE):
        drawing.savefig(path, metadata={"Date": None} if svg else None, dpi=150, transparent=svg)
    if svg:
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace("<defs>", f"<style>{_dark_rules()}</style>\n <defs>", 1), encoding="utf-8")


def _dark_rules() -> str:
    """A style sheet for readers whose page is dark; the colours themselves are attributes."""
    rules = (
        f'[style*="{kind}: {light.lower()}"] {{ {kind}: {dark} !important }}'
        for light, dark in DARK.items()
        for kind in ("fill", "stroke")
    )
    return f"@media (prefers-color-scheme: dark) {{ {' '.join(rules)} }}"
