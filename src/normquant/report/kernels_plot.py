"""Records of `normquant bench kernels` as a plot: each provider's time as a multiple of normquant's, over the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from normquant.report import plot_style
from normquant.report.plot_style import BLUE, GREEN, GREY, ORANGE, PURPLE, VERMILION

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS = "normquant"
NEEDED = ("op", "k", "normed", "inputs", "m", "provider", "us")  # fields of a record
# provider of a record -> its label and colour
SHOWN = {
    "vllm fused": ("vLLM fused", VERMILION),
    "vllm unfused": ("vLLM unfused", ORANGE),
    "torch.compile": ("torch.compile", GREEN),
    "flashinfer pdl": ("FlashInfer, PDL", PURPLE),
    "copy": ("a copy of as many bytes", GREY),
}
COPIES = ("torch copy_", "triton copy")  # the better one is drawn
TICKS = (0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24)
GAP = 0.05  # of the height, between the labels at the ends of two lines

Series = dict[str, list[tuple[int, float]]]


def series(records: Sequence[Mapping[str, Any]], op: str, k: int, normed: bool) -> Series:
    """Provider -> (rows, its time over ours), ascending in rows; inputs from DRAM.

    Raises ValueError where there is no record of ours.
    """
    us: dict[int, dict[str, float]] = {}
    for r in records:
        if r["suite"] == "kernels" and (r["op"], r["k"], r["normed"], r["inputs"]) == (op, k, normed, "dram"):
            us.setdefault(r["m"], {})[r["provider"]] = r["us"]
    found: Series = {name: [] for name in SHOWN}
    for m, times in sorted(us.items()):
        if OURS not in times:
            continue
        copies = [times[name] for name in COPIES if name in times]
        shown = times | ({"copy": min(copies)} if copies else {})
        for name in SHOWN.keys() & shown.keys():
            found[name].append((m, shown[name] / times[OURS]))
    if not any(found.values()):
        raise ValueError(f"no records of {op} with K={k}{' and the norm' * normed}, of {OURS} and of another provider")
    return {name: points for name, points in found.items() if points}


def figure(records: Sequence[Mapping[str, Any]], op: str, k: int, date: str = "") -> Figure:
    """A panel for the op and, where it was measured, one for the op that also writes the norm."""
    used = [r for r in records if r["suite"] == "kernels" and (r["op"], r["k"], r["inputs"]) == (op, k, "dram")]
    normed = any(r["normed"] for r in used)
    panels = [series(used, op, k, with_norm) for with_norm in (False, True)[: 1 + normed]]
    ratios = [1.0, *(ratio for found in panels for points in found.values() for _, ratio in points)]
    with plot_style.figure(4.6 * len(panels), 3.6, used, date) as drawing:
        axes = drawing.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for panel, found, title in zip(axes, panels, (op, f"{op}, the norm written too"), strict=False):
            _draw(panel, found, f"{title}, K = {k}", min(ratios) / 1.1, max(ratios) * 1.1)
        axes[0].set_ylabel("time relative to normquant's")
    return drawing


def _draw(axes: Axes, found: Series, title: str, lowest: float, highest: float) -> None:
    axes.set_title(title)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    rows = sorted({m for points in found.values() for m, _ in points})
    axes.set_xticks(rows[::3], [str(m) for m in rows[::3]])
    axes.set_xlabel("rows")
    axes.grid(axis="y")
    axes.axhline(1, color=BLUE, linewidth=2.5)
    ends = {OURS: (1.0, BLUE)}
    for name, points in found.items():
        label, color = SHOWN[name]
        style = "--" if name == "copy" else "-"
        axes.plot([m for m, _ in points], [ratio for _, ratio in points], style, color=color, linewidth=1.6)
        ends[label] = points[-1][1], color
    axes.set_yticks(TICKS, [f"{tick:g}x" for tick in TICKS])
    axes.minorticks_off()
    axes.set_ylim(lowest, highest)
    _label(axes, ends, rows[-1])


def _label(axes: Axes, ends: Mapping[str, tuple[float, str]], x: float) -> None:
    """Names at the ends of lines, moved up where one would cover another."""
    at = axes.transAxes.inverted()
    below = -1.0
    for name, (ratio, color) in sorted(ends.items(), key=lambda item: item[1][0]):
        height = float(at.transform(axes.transData.transform((x, ratio)))[1])
        below = max(height, below + GAP)
        axes.text(1.02, below, name, color=color, transform=axes.transAxes, va="center", fontsize=8, clip_on=False)
