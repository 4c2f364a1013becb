"""Records of `normquant bench kernels --ranks` as a plot, beside what a cost model says of the same calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from normquant.report import plot_style
from normquant.report.plot_style import BLUE, GREEN, ORANGE, PURPLE, VERMILION

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NEEDED = ("op", "k", "m", "provider", "us", "ranks")
PANELS = {"normquant": "the whole residual on every rank", "normquant sharded": "residual and sum sharded"}
ROWS = {1: BLUE, 16: GREEN, 64: ORANGE, 256: VERMILION, 2048: PURPLE}
RANKS = range(2, 17)
TICKS = (2, 4, 8, 16)

Model = Callable[[int, int, bool], float]
Points = dict[int, list[tuple[int, float]]]


def measured(records: Sequence[Mapping[str, Any]], provider: str, k: int) -> Points:
    """Rows -> (ranks, us), ascending in ranks. Raises ValueError where there are none."""
    found: Points = {}
    for r in _of_width(records, k):
        if r["provider"] == provider:
            found.setdefault(r["m"], []).append((r["ranks"], r["us"]))
    if not found:
        raise ValueError(f"no records of {provider} on several ranks with K={k}")
    return {m: sorted(found[m]) for m in sorted(found)}


def _of_width(records: Sequence[Mapping[str, Any]], k: int) -> list[Mapping[str, Any]]:
    return [r for r in records if "ranks" in r and r["k"] == k and r["m"] in ROWS]


def figure(records: Sequence[Mapping[str, Any]], model: Model, k: int, date: str = "") -> Figure:
    """A panel with the whole residual and one with a sharded one, for rows of k values.

    model: (ranks, rows, sharded) -> predicted microseconds.
    """
    used = [r for r in _of_width(records, k) if r["provider"] in PANELS]
    with plot_style.figure(8.8, 4.2, used, date) as drawing:
        axes = drawing.subplots(1, len(PANELS), sharey=True)
        for panel, (provider, title) in zip(axes, PANELS.items(), strict=True):
            predicted = {m: [model(n, m, "sharded" in provider) for n in RANKS] for m in ROWS}
            _draw(panel, f"{title}, K = {k}", measured(used, provider, k), predicted)
        axes[0].set_ylabel("all-reduce, add, norm, quantization: us a call")
        axes[0].legend(*_explained(), loc="upper left", frameon=False, fontsize=8)
    return drawing


def _draw(axes: Axes, title: str, found: Points, predicted: Mapping[int, Sequence[float]]) -> None:
    axes.set_title(title)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for m, color in ROWS.items():
        axes.plot(RANKS, predicted[m], color=color, linewidth=1.6)
        points = found.get(m, [])
        axes.plot([n for n, _ in points], [us for _, us in points], "o", color=color, markersize=5)
        axes.annotate(f"{m} row{'s' * (m > 1)}", (RANKS[-1], predicted[m][-1]), xytext=(5, 0), color=color,
                      textcoords="offset points", va="center", fontsize=8, annotation_clip=False)  # fmt: skip
    axes.set_xticks(TICKS, [str(n) for n in TICKS])
    axes.set_yticks((2, 5, 10, 20, 50, 100, 200), ("2", "5", "10", "20", "50", "100", "200"))
    axes.minorticks_off()
    axes.set_xlabel("GPUs of one NVLink domain")
    axes.set_ylim(2, 400)
    axes.grid(axis="y")


def _explained() -> tuple[list[Any], list[str]]:
    from matplotlib.lines import Line2D

    line = Line2D([], [], color=plot_style.MUTED, linewidth=1.6)
    dot = Line2D([], [], color=plot_style.MUTED, marker="o", linestyle="", markersize=5)
    return [line, dot], ["cost model, fitted on 2 and 4", "measured"]
