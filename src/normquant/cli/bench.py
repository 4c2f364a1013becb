"""`normquant bench`: what to measure, and where the records go."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

from normquant.bench.cases import BENCHMARKED, MS, Case, kernel_cases
from normquant.bench.records import KernelRecord, Record, writing
from normquant.cli import bench_vllm as vllm_command
from normquant.cli.arguments import integers

SAMPLES = 21  # of each timing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `normquant bench`."""
    suites = parser.add_subparsers(dest="suite", required=True, metavar="SUITE")
    kernels = suites.add_parser("kernels", help="each op on the shapes of DeepSeek, Qwen and Llama, beside its peers")
    add_grid(kernels)
    kernels.add_argument("--providers", help="comma-separated, of those that are installed (default: all)")
    layer = suites.add_parser("layer", help="whole decoder layers of transformers, compiled stock and fused")
    layer.add_argument("--models", help="comma-separated (default: all)")
    layer.add_argument("--m", type=integers, metavar="M,...", help="tokens (default: 1,16,64,1024,8192)")
    layer.add_argument("--samples", type=int, default=SAMPLES, help=f"samples of each timing (default: {SAMPLES})")
    vllm = suites.add_parser("vllm", help="vLLM serving a DeepSeek-R1 shard: as it comes, unfused, and with normquant")
    vllm_command.add_arguments(vllm)
    for suite in (kernels, layer, vllm):
        suite.add_argument("--output", type=Path, metavar="FILE", help="write the records here, one JSON object a line")


def add_grid(parser: argparse.ArgumentParser) -> None:
    """Arguments that choose the cases."""
    parser.add_argument("--ops", help="comma-separated (default: all)")
    parser.add_argument("--k", type=integers, metavar="K,...", help="widths (default: those of the models)")
    parser.add_argument("--m", type=integers, metavar="M,...", help="rows (default: 1 to 16384)")
    parser.add_argument("--samples", type=int, default=SAMPLES, help=f"samples of each timing (default: {SAMPLES})")
    parser.add_argument("--l2", action="store_true", help="inputs that stay in the L2 (default: they come from DRAM)")


def need_gpu() -> None:
    """Raise ValueError where nothing can be measured."""
    import torch

    if not torch.cuda.is_available():
        raise ValueError("there is no CUDA GPU here; everything is measured on one")


def grid_cases(args: argparse.Namespace) -> list[Case]:
    """The cases that the arguments ask for; raises ValueError where there are none."""
    ops = tuple(args.ops.split(",")) if args.ops else BENCHMARKED
    if unknown := set(ops) - set(BENCHMARKED):
        raise ValueError(f"unknown ops {', '.join(sorted(unknown))}; accepted: {', '.join(BENCHMARKED)}")
    cases = list(kernel_cases(ops, args.k, args.m or MS))
    if not cases:
        raise ValueError(f"no case of {', '.join(ops)} has k in {args.k}")
    return cases


def run(args: argparse.Namespace) -> int:
    """Measure, print a line a case, write the records."""
    need_gpu()
    if args.suite == "vllm":
        return vllm_command.run(args)
    start, count = time.monotonic(), 0
    with writing(args.output) if args.output else nullcontext(len) as add:
        for new, text in {"kernels": kernel_suite, "layer": layer_suite}[args.suite](args):
            add(new)
            count += len(new)
            print(text, flush=True)
    print(f"{count} records in {time.monotonic() - start:.0f} s", file=sys.stderr)
    return 0


def layer_suite(args: argparse.Namespace) -> Iterator[tuple[list[Record], str]]:
    """Each model at each M: its records and a line about them."""
    from normquant.bench.layers import MS, measure
    from normquant.bench.models import MODELS

    names = args.models.split(",") if args.models else list(MODELS)
    if unknown := set(names) - set(MODELS):
        raise ValueError(f"unknown models {', '.join(sorted(unknown))}; accepted: {', '.join(MODELS)}")
    for name in names:
        for record in measure(name, args.m or MS, args.samples):
            yield [record], f"{name} m={record.m} {record.setting}: {record.us:.1f} us, {record.kernels} kernels"


def kernel_suite(args: argparse.Namespace) -> Iterator[tuple[list[Record], str]]:
    """Each case: the records of all providers and a line about them."""
    from normquant.bench.kernels import measure
    from normquant.bench.precompile import precompile
    from normquant.bench.providers import PROVIDERS

    names = args.providers.split(",") if args.providers else list(PROVIDERS)
    if unknown := set(names) - set(PROVIDERS):
        raise ValueError(f"unknown providers {', '.join(sorted(unknown))}; accepted: {', '.join(PROVIDERS)}")
    providers = []
    for name, provider in PROVIDERS.items():
        if name not in names:
            continue
        if lacks := provider.lacks():
            print(f"{name}: left out, {lacks}", file=sys.stderr)
        else:
            providers.append(provider)
    cases = grid_cases(args)
    if trouble := precompile(cases, providers):
        print(trouble, file=sys.stderr)
    for case in cases:
        new = list(measure(case, providers, args.samples, args.l2))
        yield [*new], line(new)


def line(records: Sequence[KernelRecord]) -> str:
    """One case as a line of text: us of each provider, and whose output is not what its rule says."""
    first = records[0]
    times = "  ".join(f"{r.provider} {r.us:.2f}{'' if r.match in ('bitwise', 'not an op') else '*'}" for r in records)
    ours = next((r for r in records if r.provider == "normquant"), None)
    copy = f"  [{ours.pct_of_copy:.0f}% of copy]" if ours and ours.pct_of_copy else ""
    return f"{first.op}{' +norm' if first.normed else ''} m={first.m} k={first.k}: {times}{copy}"
