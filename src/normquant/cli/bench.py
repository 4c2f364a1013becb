"""Measure on this GPU: kernels beside their peers, products, whole decoder layers, or vLLM serving a model."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normquant.bench.record_files import writing
from normquant.bench.records import KernelRecord, Record
from normquant.cli import bench_vllm
from normquant.cli.arguments import chosen, integers
from normquant.cli.output_files import check_writable
from normquant.cli.progress import add_quiet, compiling, showing

if TYPE_CHECKING:  # what imports torch is imported where something is measured
    from normquant.bench.cases import Case
    from normquant.bench.products import ProductCase
    from normquant.bench.vllm.supervisor import Failure

    Found = Iterator[tuple[Sequence[Record], str] | Failure]  # records and a line about them

SAMPLES = 21  # of each timing
RANKS_MS = (1, 4, 16, 32, 64, 128, 256, 512, 2048)
EXIT_FAILED = 2  # a process of vLLM failed: that is no check that did not hold


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `normquant bench`."""
    suites = parser.add_subparsers(dest="suite", required=True, metavar="SUITE")
    kernels = suites.add_parser("kernels", help="each op on the shapes of DeepSeek, Qwen and Llama, beside its peers")
    add_grid(kernels)
    kernels.add_argument("--providers", help="comma-separated, of those that are installed (default: all)")
    kernels.add_argument("--ranks", type=int, metavar="N", help="an all-reduce before them, on N GPUs of this host")
    linear = suites.add_parser(
        "linear", help="block-FP8 products of few rows, alone and with the kernel that reads them"
    )
    linear.add_argument("--models", help="comma-separated (default: all)")
    linear.add_argument("--k", type=integers, metavar="K,...", help="only products of these K")
    linear.add_argument("--m", type=integers, metavar="M,...", help="rows (default: 1,8,16,31,64)")
    linear.add_argument("--providers", help="comma-separated, of those that are installed (default: all)")
    linear.add_argument("--samples", type=int, default=SAMPLES, help=f"samples of each timing (default: {SAMPLES})")
    decode = suites.add_parser(
        "decode", help="a decode step of DeepSeek-R1's layers in one CUDA graph, by the products in it"
    )
    decode.add_argument("--m", type=integers, default=(1, 16, 64), metavar="M,...", help="tokens (default: 1,16,64)")
    decode.add_argument(
        "--providers", help="comma-separated, today's products, of those that are installed (default: all)"
    )
    decode.add_argument("--samples", type=int, default=SAMPLES, help=f"samples of each timing (default: {SAMPLES})")
    layer = suites.add_parser("layer", help="whole decoder layers of transformers, compiled stock and fused")
    layer.add_argument("--models", help="comma-separated (default: all)")
    layer.add_argument("--m", type=integers, metavar="M,...", help="tokens (default: 1,16,64,1024,8192)")
    layer.add_argument("--samples", type=int, default=SAMPLES, help=f"samples of each timing (default: {SAMPLES})")
    vllm = suites.add_parser("vllm", help="vLLM serving a DeepSeek-R1 shard: as it comes, unfused, and with normquant")
    bench_vllm.add_arguments(vllm)
    for suite in (kernels, linear, decode, layer, vllm):
        suite.add_argument("--output", type=Path, metavar="FILE", help="write the records here, one JSON object a line")
        add_quiet(suite)


def add_grid(parser: argparse.ArgumentParser) -> None:
    """Arguments that choose the cases."""
    parser.add_argument("--ops", help="comma-separated (default: all)")
    parser.add_argument("--k", type=integers, metavar="K,...", help="widths (default: those of the models)")
    parser.add_argument("--m", type=integers, metavar="M,...", help="rows (default: 1 to 16384)")
    parser.add_argument("--samples", type=int, default=SAMPLES, help=f"samples of each timing (default: {SAMPLES})")
    parser.add_argument("--l2", action="store_true", help="inputs that stay in the L2 (default: they come from DRAM)")


def need_gpu(count: int = 1) -> None:
    """Raise ValueError where nothing can be measured."""
    import torch

    if not torch.cuda.is_available():
        raise ValueError("there is no CUDA GPU here; everything is measured on one")
    if count > 1 and (there := torch.cuda.device_count()) < count:
        raise ValueError(f"{count} GPUs are asked for, and here are {there}")


def grid_cases(args: argparse.Namespace) -> list[Case]:
    """The cases that the arguments ask for; raises ValueError where there are none."""
    from normquant.bench.cases import BENCHMARKED, MS, kernel_cases

    ops = tuple(chosen(args.ops, BENCHMARKED, "ops"))
    cases = list(kernel_cases(ops, args.k, args.m or MS))
    if not cases:
        raise ValueError(f"no case of {', '.join(ops)} has k in {args.k}")
    return cases


def run(args: argparse.Namespace) -> int:
    """Measure, print a line for each case, write the records; 2 if a process of vLLM failed."""
    check_writable(args.output)
    need_gpu(getattr(args, "tensor_parallel", 1))
    from normquant.bench.vllm.supervisor import Failure

    suite: Callable[[argparse.Namespace], Found] = SUITES[args.suite]
    start, count, code = time.monotonic(), 0, 0
    with writing(args.output) as add, showing(total(args), args.quiet) as progress:
        for found in suite(args):
            if isinstance(found, Failure):
                code = EXIT_FAILED
                progress.line(f"{found.job.name} failed {found.reason}\n{found.log}", sys.stderr)
                continue
            new, text = found
            add(new)
            count += len(new)
            progress.line(text)
            progress.step(bool(new))
    print(f"{count} records in {time.monotonic() - start:.0f} s", file=sys.stderr)
    return code


def total(args: argparse.Namespace) -> int:
    """How many times a suite yields records."""
    if args.suite == "vllm":
        return sum(len(job.batches) for group in bench_vllm.groups(args, Path()) for job in group)
    if args.suite == "linear":
        return len(linear_cases(args))
    if args.suite == "decode":
        return len(args.m)
    if args.suite == "layer":
        from normquant.bench import decoder_layers

        models = chosen(args.models, decoder_layers.MODELS, "models")
        return len(models) * len(args.m or decoder_layers.MS) * len(decoder_layers.settings())
    return len(ranks_cases(args) if args.ranks else grid_cases(args))


def ranks_cases(args: argparse.Namespace) -> list[Case]:
    """Rows of 7168 values unless others are asked for."""
    from normquant.bench.cases import Case

    return [Case("add_rms_norm_quant", m, k) for k in args.k or (7168,) for m in args.m or RANKS_MS]


def kernel_suite(args: argparse.Namespace) -> Found:
    """Each case: the records of all providers and a line about them."""
    if args.ranks:
        yield from ranks_suite(args)
        return
    from normquant.bench import kernels
    from normquant.bench.precompile import precompile
    from normquant.bench.providers import PROVIDERS

    providers = [PROVIDERS[name] for name in installed(args.providers, PROVIDERS)]
    cases = grid_cases(args)
    with compiling(args.quiet) as told:
        if trouble := precompile(cases, providers, told):
            print(trouble, file=sys.stderr)
    for case in cases:
        new = list(kernels.measure(case, providers, args.samples, args.l2))
        yield new, kernel_line(new)


def installed(names: str | None, providers: Mapping[str, Any]) -> list[str]:
    """The names of those that are asked for and can run here; says why others cannot."""
    asked = chosen(names, providers, "providers")
    lacking = {name: lacks for name in providers if name in asked and (lacks := providers[name].lacks())}
    for name, lacks in lacking.items():
        print(f"{name}: left out, {lacks}", file=sys.stderr)
    return [name for name in providers if name in asked and name not in lacking]


def linear_suite(args: argparse.Namespace) -> Found:
    """Each product: the records of all providers and parts and a line about them."""
    from normquant.bench import products

    names = installed(args.providers, products.PRODUCT_PROVIDERS)
    if not names:
        raise ValueError("no provider is left")
    for case in linear_cases(args):
        records = products.product_records(case, names, args.samples)
        yield records, products.product_line(records)


def linear_cases(args: argparse.Namespace) -> list[ProductCase]:
    """Products that were asked for. Raises ValueError where there are none."""
    from normquant.bench import products

    models = chosen(args.models, products.SHAPES, "models")
    cases = products.product_cases(args.k, args.m or products.FEW_MS, models)
    if not cases:
        raise ValueError(f"no product of {', '.join(models)} has k in {args.k}")
    return cases


def decode_suite(args: argparse.Namespace) -> Found:
    """Each number of tokens: the records of all providers and a line about them."""
    from normquant.bench import decode

    names = installed(args.providers, decode.TODAY)
    if not names:
        raise ValueError("no provider is left")
    for records in decode.measure(args.m, names, args.samples):
        yield records, decode.line(records)


def ranks_suite(args: argparse.Namespace) -> Found:
    """The same with an all-reduce, on several GPUs."""
    from normquant.bench import rank_providers, ranks

    names = args.providers.split(",") if args.providers else None
    rank_providers.named(names)
    for records in ranks.on_ranks(args.ranks, ranks_cases(args), names, args.samples):
        yield records, ranks.line(records)


def kernel_line(records: Sequence[KernelRecord]) -> str:
    """One case as a line of text: us of each provider, and whose output is not what its rule says."""
    first = records[0]
    times = "  ".join(f"{r.provider} {r.us:.2f}{'' if r.match in ('bitwise', 'not an op') else '*'}" for r in records)
    ours = next((r for r in records if r.provider == "normquant"), None)
    copy = f"  [{ours.pct_of_copy:.0f}% of copy]" if ours and ours.pct_of_copy else ""
    return f"{first.op}{' +norm' if first.normed else ''} m={first.m} k={first.k}: {times}{copy}"


def layer_suite(args: argparse.Namespace) -> Found:
    """Each model at each M: its records and a line about them."""
    from normquant.bench import decoder_layers

    for name in chosen(args.models, decoder_layers.MODELS, "models"):
        for r in decoder_layers.measure(name, args.m or decoder_layers.MS, args.samples):
            yield [r], f"{name} m={r.m} {r.setting}: {r.us:.1f} us, {r.kernels} kernels"


SUITES = {
    "kernels": kernel_suite,
    "linear": linear_suite,
    "decode": decode_suite,
    "layer": layer_suite,
    "vllm": bench_vllm.suite,
}
