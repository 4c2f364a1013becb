"""`normquant tune`: measures launch configs on this GPU and writes the table that the kernels choose from."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from normquant.bench.command import add_grid, grid_cases, need_gpu


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `normquant tune`."""
    add_grid(parser)
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="where the table goes (default: into this installation)"
    )


def run(args: argparse.Namespace) -> int:
    """Measure and write the table; an (op, K) that was not measured keeps its rows."""
    need_gpu()
    cases = grid_cases(args)
    import torch

    from normquant.bench import tune

    path = args.output or tune.table_path(torch.cuda.get_device_capability())
    print(f"compiling on {os.cpu_count()} cores", file=sys.stderr)
    tune.precompile(cases)
    table = json.loads(path.read_text()) if path.is_file() else {}
    for op, widths in tune.tune(cases, args.samples, lambda text: print(text, flush=True)).items():
        table.setdefault(op, {}).update(widths)
    tune.write(path, table)
    print(f"table in {path}", file=sys.stderr)
    return 0
