"""`normquant plot`: records of `normquant bench kernels` as a drawing."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from normquant.bench.records import read
from normquant.report import kernels_plot


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `normquant plot`."""
    parser.add_argument("records", type=Path, metavar="FILE", help="records, as `normquant bench kernels` writes them")
    parser.add_argument("--op", default="add_rms_norm_quant", help="(default: add_rms_norm_quant)")
    parser.add_argument("--k", type=int, default=7168, help="width (default: 7168)")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="an .svg, .png or .pdf")


def run(args: argparse.Namespace) -> int:
    """Draw."""
    kernels_plot.save(kernels_plot.figure(list(read(args.records)), args.op, args.k), args.output)
    print(args.output, file=sys.stderr)
    return 0
