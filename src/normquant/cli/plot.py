"""Draw records of `normquant bench`: kernels, layers, vLLM's decode steps, or several ranks beside the cost model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normquant.bench.record_files import read
from normquant.cli.output_files import check_writable, replacing
from normquant.report import kernels_plot, layer_plot, plot_style, ranks_plot, vllm_plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Records = list[dict[str, Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `normquant plot`."""
    parser.add_argument("records", type=Path, metavar="FILE", help="records, as `normquant bench` writes them")
    parser.add_argument("--suite", choices=list(FIGURES), default="kernels", help="what to draw (default: %(default)s)")
    parser.add_argument("--op", default="add_rms_norm_quant", help="of the kernels (default: %(default)s)")
    parser.add_argument("--k", type=int, default=7168, help="width of the kernels' rows (default: 7168)")
    parser.add_argument("--date", default="", help="when records that do not say so were measured")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="an .svg, .png or .pdf")


def run(args: argparse.Namespace) -> int:
    """Draw."""
    check_writable(args.output)
    needed, draw = FIGURES[args.suite]
    drawing = draw(list(read(args.records, needed)), args)
    with replacing(args.output) as part:
        plot_style.save(drawing, part)
    print(args.output, file=sys.stderr)
    return 0


def _ranks(records: Records, args: argparse.Namespace) -> Figure:
    """With the cost model: the algorithm that it says is the faster one."""
    from normquant.distributed.algorithms import ONE_SHOT, TWO_SHOT
    from normquant.distributed.cost import H200, GroupCall

    def us(ranks: int, m: int, sharded: bool) -> float:
        return min(H200.us(GroupCall(ranks, m, algorithm, sharded, args.k)) for algorithm in (ONE_SHOT, TWO_SHOT))

    return ranks_plot.figure(records, us, args.k, args.date)


# suite -> the fields that its records need, and what draws them
FIGURES: dict[str, tuple[Iterable[str], Callable[[Records, argparse.Namespace], Figure]]] = {
    "kernels": (kernels_plot.NEEDED, lambda records, args: kernels_plot.figure(records, args.op, args.k, args.date)),
    "layer": (layer_plot.NEEDED, lambda records, args: layer_plot.figure(records, args.date)),
    "vllm": (vllm_plot.NEEDED, lambda records, args: vllm_plot.figure(records, args.date)),
    "ranks": (ranks_plot.NEEDED, _ranks),
}
