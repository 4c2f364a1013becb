"""Records of `normquant bench vllm` as a plot: the GPU time of a decode step, by class of kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from normquant.report import plot_style
from normquant.report.plot_style import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION
from normquant.report.vllm_text import setting_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NEEDED = ("setting", "linear", "layers", "moe", "batch", "gpu_us_per_step", "classes")
# what is drawn together: label -> (classes of a record, colour)
GROUPS = {
    "matrix products": (("gemm",), GREY),
    "experts": (("moe",), SKY),
    "attention, rotary embedding": (("attention", "rope"), PURPLE),
    "all-reduce": (("all_reduce",), ORANGE),
    "norm, quantization, gated product": (("norm_quant", "norm", "quant", "silu_quant", "silu"), BLUE),
    "copies, pointwise": (("copy", "pointwise"), VERMILION),
    "other": (("other",), GREEN),
}
# setting of a record -> how it is called; in this order
SETTINGS = {
    "installed": "as installed",
    "installed-normquant": "with normquant",
    "installed-normquant, products never": "with normquant, vLLM's products",
    "default": "default",
    "off": "fusion off",
    "unfused": "unfused",
    "normquant": "with normquant",
}
Model = tuple[str, int, bool, bool]


def models(records: Sequence[Mapping[str, Any]]) -> dict[Model, list[Mapping[str, Any]]]:
    """(linear kernel, layers, with experts, compiled) -> its records, by batch and setting.

    Left out are records of several GPUs, whose profiled steps measure how late the others were. Raises ValueError where
    no others are there.
    """
    found: dict[Model, dict[tuple[int, int], Mapping[str, Any]]] = {}
    order = list(SETTINGS)
    for r in records:
        if r["suite"] == "vllm" and setting_name(r) in SETTINGS and r.get("tensor_parallel", 1) == 1:
            bars = found.setdefault((r["linear"], r["layers"], r["moe"], r.get("compiled", True)), {})
            bars[r["batch"], order.index(setting_name(r))] = r  # of the same case the later one
    if not found:
        raise ValueError("no records of vLLM's decode steps")
    return {model: [bars[key] for key in sorted(bars)] for model, bars in found.items()}


def grouped(record: Mapping[str, Any]) -> dict[str, float]:
    """Microseconds of a record by group. A class that is in no group counts as other."""
    known = {name: label for label, (names, _) in GROUPS.items() for name in names}
    found = dict.fromkeys(GROUPS, 0.0)
    for name, us in record["classes"].items():
        found[known.get(name, "other")] += us
    return found


def change(record: Mapping[str, Any], held: Sequence[Mapping[str, Any]]) -> str:
    """Of a step's time against the first setting of the same batch."""
    first = next(r for r in held if r["batch"] == record["batch"])
    return "" if first is record else f"{100 * (record['gpu_us_per_step'] / first['gpu_us_per_step'] - 1):+.1f} %"


def figure(records: Sequence[Mapping[str, Any]], date: str = "") -> Figure:
    """A panel a model, a bar for each batch and setting."""
    found = models(records)
    used = [r for held in found.values() for r in held]
    heights = [len(held) + _gaps(held) for held in found.values()]
    with plot_style.figure(7.6, 1.7 + 0.2 * sum(heights) + 0.45 * len(heights), used, date) as drawing:
        axes = drawing.subplots(len(found), 1, height_ratios=heights, squeeze=False)[:, 0]
        for panel, (model, held) in zip(axes, found.items(), strict=True):
            _draw(panel, _title(model, held[0]), held)
        axes[-1].set_xlabel("GPU time of a decode step, us")
        shown = {label: bar for axis in axes for bar, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        drawing.legend(shown.values(), shown.keys(), loc="outside upper left", ncols=3, frameon=False, fontsize=8.5)
    return drawing


def _gaps(held: Sequence[Mapping[str, Any]]) -> float:
    return 0.6 * len({r["batch"] for r in held})


def _title(model: Model, record: Mapping[str, Any]) -> str:
    linear, layers, moe, compiled = model
    installed = "as pip installs it" if record["setting"].startswith("installed") else f"linear kernel {linear}"
    experts = ", some with experts" if moe else ""
    otherwise = "" if compiled else ", not compiled"
    return f"vLLM {record['vllm']}, {installed}; {layers} layers of DeepSeek-R1{experts}{otherwise}"


def _draw(axes: Axes, title: str, held: Sequence[Mapping[str, Any]]) -> None:
    """Bars from top to bottom, each with its time and what changed."""
    axes.set_title(title)
    longest = max(r["gpu_us_per_step"] for r in held)
    y, ticks, labels, batch = 0.0, [], [], None
    for r in held:
        y += 1.0 if r["batch"] == batch else 1.6
        batch = r["batch"]
        left = 0.0
        for label, us in grouped(r).items():
            if us:
                axes.barh(y, us, left=left, height=0.86, color=GROUPS[label][1], label=label, linewidth=0)
            left += us
        text = "  ".join(filter(None, [f"{r['gpu_us_per_step']:.0f}", change(r, held)]))
        axes.text(left + longest * 0.01, y, text, va="center", fontsize=8)
        ticks.append(y)
        labels.append(f"batch {batch}, {SETTINGS[setting_name(r)]}")
    axes.set_yticks(ticks, labels)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(y + 0.7, 0.9)
    axes.set_xlim(0, longest * 1.17)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
