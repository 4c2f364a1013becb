"""Measure on this GPU what the kernels and the compile pass choose from, and write their tables."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normquant.bench.records import current_command
from normquant.cli.bench import SAMPLES, add_grid, grid_cases, need_gpu
from normquant.cli.output_files import check_writable, replacing
from normquant.cli.progress import add_quiet, compiling, showing

if TYPE_CHECKING:
    from normquant.bench.cases import Case
    from normquant.bench.products import ProductCase
    from normquant.kernels.configs import ConfigTable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `normquant tune`."""
    add_grid(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--strategies",
        action="store_true",
        help="time the strategies of the compile pass, for policy auto, and not the launch configs of the kernels",
    )
    what.add_argument(
        "--linear",
        action="store_true",
        help="time how block-FP8 products of few rows are split and launched, then beside their peers, alone and with "
        "the kernel that reads them (default: --m 1,8,16,31,64); writes four tables into this installation",
    )
    what.add_argument(
        "--decode",
        action="store_true",
        help="time the launch configs in a decode step of DeepSeek-R1, between GEMMs (default: --m 1,16,64 "
        "--samples 100), and replace those of up to the largest M",
    )
    what.add_argument(
        "--clusters",
        action="store_true",
        help="time, beside the present launch configs, only those whose programs are thread block clusters",
    )
    add_quiet(parser)
    parser.set_defaults(samples=None)  # the default depends on what is timed
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="where the table goes (default: into this installation)"
    )


def run(args: argparse.Namespace) -> int:
    """Measure and write a table; an (op, K) that was not measured keeps its rows."""
    if args.decode and (args.ops or args.k or args.l2):
        raise ValueError("--decode times the ops and widths of DeepSeek-R1 in place: it takes no --ops, --k or --l2")
    if args.linear and (args.ops or args.l2 or args.output):
        raise ValueError("--linear times products, whose weights come from DRAM: it takes no --ops, --l2 or --output")
    need_gpu()
    if args.linear:
        path = linear(args)
    elif args.decode:
        path = decode(args)
    else:
        args.samples = SAMPLES if args.samples is None else args.samples
        cases = grid_cases(args)
        path = strategies(args, cases) if args.strategies else configs(args, cases)
    print(f"table in {path}", file=sys.stderr)
    return 0


def configs(args: argparse.Namespace, cases: list[Case]) -> Path:
    """The launch configs of the kernels."""
    import torch

    from normquant.tune import launch_configs

    path = _destination(args.output, launch_configs.table_path(torch.cuda.get_device_capability()))
    table = _present(path)
    candidates = launch_configs.present_and_clusters if args.clusters else launch_configs.candidates
    if args.clusters:
        cases = [case for case in cases if launch_configs.clusters(case)]
    with compiling(args.quiet) as told:
        if trouble := launch_configs.precompile(cases, candidates, told):
            print(trouble, file=sys.stderr)
    with showing(len(cases), args.quiet) as progress:
        found = launch_configs.tune(cases, args.samples, progress.result, args.l2, candidates)
    _write_configs(path, table, found)
    return path


def decode(args: argparse.Namespace) -> Path:
    """The launch configs of the kernels in a decode step."""
    import torch

    from normquant.tune import by_decode_step, launch_configs
    from normquant.tune.decode_step import DEEPSEEK_R1, find_gemm

    capability = torch.cuda.get_device_capability()
    path = _destination(args.output, launch_configs.table_path(capability))
    table = _present(path)
    ms, gemm = args.m or by_decode_step.DECODE_MS, find_gemm(capability)
    with compiling(args.quiet) as told:
        if trouble := by_decode_step.precompile(ms, capability, told):
            print(trouble, file=sys.stderr)
    replays = by_decode_step.REPLAYS if args.samples is None else args.samples
    results = 1 + len(set(ms)) * (len(DEEPSEEK_R1.widths) + 1)  # a line that says what is timed; each op, and the step
    with showing(results, args.quiet) as progress:
        found = by_decode_step.tune(ms, replays, gemm, progress.result)
    with replacing(path) as part:
        launch_configs.write(part, by_decode_step.merged(table, found, DEEPSEEK_R1.widths, capability))
    return path


def linear(args: argparse.Namespace) -> Path:
    """How products are split and launched, and which of them are chosen."""
    import torch

    from normquant.bench.products import FEW_MS, PRODUCT_PROVIDERS, product_cases
    from normquant.cli.bench import installed
    from normquant.tune import launch_configs, product_tables

    capability, names = torch.cuda.get_device_capability(), installed(None, PRODUCT_PROVIDERS)
    samples = SAMPLES if args.samples is None else args.samples
    paths = product_tables.paths(capability)
    for path in (*paths, launch_configs.table_path(capability)):
        _present(_destination(path, path))
    cases = product_cases(args.k, args.m or FEW_MS)
    with compiling(args.quiet) as told:
        if trouble := product_tables.precompile(cases, told):
            print(trouble, file=sys.stderr)
    for found in product_tables.tune(cases, samples):
        print(found.text, flush=True)
        for path, table in zip(paths[:2], found.tables, strict=True):
            _merge(path, table)
    product_tables.read_again()
    readers(args, cases, samples)
    for _, product in groupby(_told(product_tables.compare(cases, names, samples)), key=lambda e: (e["k"], e["n"])):
        entries = list(product)
        with replacing(paths[2]) as part:  # what was measured is there if the rest is not
            product_tables.write(
                part, product_tables.merged(_present(paths[2]), entries, capability, current_command())
            )
    return paths[2]


def _told(entries: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The entries of the table that chooses, each printed when it is there."""
    for entry in entries:
        times = ", ".join(f"{name} {us} us" for name, us in entry["us"].items())
        print(f"{entry['part']} {entry['k']}x{entry['n']} m={entry['m'][1]}: {times}", flush=True)
        yield entry


def readers(args: argparse.Namespace, cases: list[ProductCase], samples: int) -> None:
    """The launch configs of the ops that read the products."""
    import torch

    from normquant.kernels import configs
    from normquant.tune import launch_configs, reader_configs

    read = reader_configs.read(cases)
    if not read:
        return
    with compiling(args.quiet) as told:
        if trouble := reader_configs.precompile(cases, told):
            print(trouble, file=sys.stderr)
    with showing(len(read), args.quiet) as progress:
        found = reader_configs.tune(cases, samples, progress.result)
    path = launch_configs.table_path(torch.cuda.get_device_capability())
    _write_configs(path, _present(path), found)
    configs.read_again()


def _write_configs(path: Path, table: ConfigTable, found: ConfigTable) -> None:
    """The table with what was found in place of its rows of the same ops and widths."""
    from normquant.tune import launch_configs

    for op, widths in found.items():
        table.setdefault(op, {}).update(widths)
    with replacing(path) as part:
        launch_configs.write(part, table)


def _merge(path: Path, table: dict[str, Any]) -> None:
    """Put a product's part of a table into the one that is there."""
    merged = _present(path) | table
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(merged[name])}" for name in sorted(merged))
    with replacing(path) as part:
        part.write_text(f"{{\n{lines}\n}}\n")


def strategies(args: argparse.Namespace, cases: list[Case]) -> Path:
    """The strategies of the compile pass, for the norms."""
    import torch

    from normquant.tune import strategies

    capability = torch.cuda.get_device_capability()
    path = _destination(args.output, strategies.table_path(capability))
    _present(path)
    norms = sorted((c for c in cases if "cluster" in c.definition.choices), key=lambda c: (c.op_name, c.k, c.m))
    entries = []
    with showing(len(norms), args.quiet) as progress:
        for _, op in groupby(norms, key=lambda c: (c.op_name, c.k)):
            for entry in strategies.measure(list(op), args.samples, args.l2):
                entries.append(entry)
                times = ", ".join(f"{name} {us} us" for name, us in entry["us"].items())
                progress.result(f"{entry['op']} k={entry['k']} m={entry['m'][1]}: {times}")
    with replacing(path) as part:
        if path.is_file():  # `write` keeps the entries that are there
            shutil.copyfile(path, part)
        strategies.write(part, capability, current_command(), entries)
    return path


def _destination(output: Path | None, default: Path) -> Path:
    """Where the table goes. Raises OSError, before anything is measured, where it cannot be written."""
    path = output or default
    path.parent.mkdir(exist_ok=True)
    check_writable(path)
    return path


def _present(path: Path) -> dict[str, Any]:
    """The table whose rows are kept where nothing is measured. Raises ValueError for a file that is no table."""
    if not path.is_file():
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no table: {error}") from None
    if not isinstance(table, dict):
        raise ValueError(f"{path} is no table, but a JSON {type(table).__name__}")
    return table
