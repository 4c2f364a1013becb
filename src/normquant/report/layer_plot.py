"""Records of `normquant bench layer` as a plot: the time of whole decoder layers, relative to the stock compile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from normquant.report import plot_style
from normquant.report.plot_style import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STOCK, OURS = "stock", "normquant"
NEEDED = ("model", "setting", "m", "us")
COLORS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)

Series = dict[str, list[tuple[int, float]]]


def series(records: Sequence[Mapping[str, Any]]) -> Series:
    """Model -> (tokens, normquant's time over the stock compile's), ascending in tokens.

    Raises ValueError where no layer was measured with both.
    """
    us = {(r["model"], r["m"], r["setting"]): r["us"] for r in records if r["suite"] == "layer"}
    found: Series = {}
    for model, m, setting in us:
        if setting == OURS and (model, m, STOCK) in us:
            found.setdefault(model, []).append((m, us[model, m, OURS] / us[model, m, STOCK]))
    if not found:
        raise ValueError(f"no records of a layer with both settings, {STOCK} and {OURS}")
    return {model: sorted(points) for model, points in found.items()}


def figure(records: Sequence[Mapping[str, Any]], date: str = "") -> Figure:
    """One line a model, below the line of the stock compile where normquant is faster."""
    from matplotlib.ticker import MultipleLocator

    found = series(records)
    used = [r for r in records if r["suite"] == "layer"]
    with plot_style.figure(6.4, 3.4, used, date) as drawing:
        axes = drawing.subplots()
        axes.set_xscale("log", base=2)
        tokens = sorted({m for points in found.values() for m, _ in points})
        axes.set_xticks(tokens, [str(m) for m in tokens])
        axes.set_xlabel("tokens")
        axes.grid(axis="y")
        axes.axhline(1, color=plot_style.MUTED, linewidth=1.6)
        for (model, points), color in zip(found.items(), COLORS, strict=False):
            x, y = [m for m, _ in points], [ratio for _, ratio in points]
            axes.plot(x, y, "o-", color=color, linewidth=1.6, markersize=4, label=model)
        axes.yaxis.set_major_locator(MultipleLocator(0.05))
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * (value - 1):+.0f} %" if value != 1 else "stock")
        axes.set_ylim(None, 1.02)
        axes.set_title("A decoder layer with normquant, time relative to torch.compile with dynamic rows")
        drawing.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False)
    return drawing
