"""Draw records of `normquant bench kernels`: the time of every provider as a multiple of normquant's."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from normquant.bench.records import read
from normquant.cli.output_files import check_writable, replacing
from normquant.report import kernels_plot


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `normquant plot`."""
    parser.add_argument("records", type=Path, metavar="FILE", help="records, as `normquant bench kernels` writes them")
    parser.add_argument("--op", default="add_rms_norm_quant", help="(default: %(default)s)")
    parser.add_argument("--k", type=int, default=7168, help="width (default: 7168)")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="an .svg, .png or .pdf")


def run(args: argparse.Namespace) -> int:
    """Draw."""
    check_writable(args.output)
    drawing = kernels_plot.figure(list(read(args.records, kernels_plot.NEEDED)), args.op, args.k)
    with replacing(args.output) as part:
        kernels_plot.save(drawing, part)
    print(args.output, file=sys.stderr)
    return 0
