"""Measure on this GPU: kernels beside their peers, products, whole decoder layers, or vLLM serving a model."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normquant.bench.records import KernelRecord, Record, writing
from normquant.bench.vllm.job import INSTALLED, LABORATORY, LINEARS, Job
from normquant.cli.arguments import POLICIES, PRODUCTS, chosen, integers
from normquant.cli.output_files import check_writable
from normquant.cli.progress import add_quiet, compiling, showing
from normquant.report import vllm_text

if TYPE_CHECKING:  # what imports torch is imported where something is measured
    from normquant.bench.cases import Case
    from normquant.bench.products import ProductCase
    from normquant.bench.vllm.supervisor import Failure

    Found = Iterator[tuple[Sequence[Record], str] | Failure]  # records and a line about them

SAMPLES = 21  # of each timing
RANKS_MS = (1, 4, 16, 32, 64, 128, 256, 512, 2048)
STEPS = 32  # decode steps of a sample of vLLM
COMPARED = 32  # prompts whose logits are compared
EXIT_FAILED = 2  # a process of vLLM failed: that is no check that did not hold


def expert_layers(text: str) -> tuple[int, ...]:
    """'0,4' -> (0, 4), an argparse type; unlike other sizes, these start at 0."""
    return tuple(0 if part == "0" else integers(part)[0] for part in text.split(","))


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
    _add_vllm(vllm)
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


def _add_vllm(parser: argparse.ArgumentParser) -> None:
    add, settings = parser.add_argument, ",".join(LABORATORY)
    add(
        "--as-installed", action="store_true",
        help="vLLM as pip installs it, without and with normquant (the default without --settings and --linear)",
    )  # fmt: skip
    add(
        "--settings",
        help="in a laboratory, where FlashInfer's linear kernel is switched off: comma-separated "
        f"(default there: {settings}); also unfused, vLLM without its fused silu either",
    )  # fmt: skip
    add("--linear", help="the linear kernel there: deepgemm, cutlass, or both (default there: deepgemm)")
    add("--tensor-parallel", type=int, default=1, metavar="N", help="GPUs that compute the model together (default: 1)")
    add("--all-reduce", action="store_true", help="have normquant fuse their all-reduces, which is off by default")
    add("--layers", type=int, default=16, help="decoder layers (default: 16)")
    add(
        "--moe", type=expert_layers, default=(0,), metavar="N,...",
        help="how many of them, the last ones, have 256 experts; a model for each number (default: 0)",
    )  # fmt: skip
    add("--batch", type=integers, default=(1, 16, 64), metavar="N,...", help="requests (default: 1,16,64)")
    add("--prefill", type=integers, default=(2048, 8192), metavar="N,...", help="prompts (default: 2048,8192 tokens)")
    add("--samples", type=int, default=5, help="samples of each timing (default: 5)")
    add("--steps", type=int, default=STEPS, help=f"decode steps of a sample (default: {STEPS})")
    add("--policy", default="auto", choices=POLICIES, help="of normquant (default: auto)")
    add(
        "--products", default="auto", choices=PRODUCTS,
        help="whether normquant's products of few rows take the place of vLLM's (default: auto, where measured)",
    )  # fmt: skip
    add("--workers", type=int, help="processes that start together (default: those of one model and linear)")
    add("--timeout", type=float, default=900, metavar="S", help="of a start, of a measurement (default: 900)")
    add("--keep", type=Path, metavar="DIR", help="keep vLLM's caches, reports, logs and kernels here")


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
        return sum(len(job.batches) for group in vllm_groups(args, Path()) for job in group)
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


def vllm_suite(args: argparse.Namespace) -> Found:
    """Each setting at each batch: its record and a line about it, or the failure of its process; at the end a table."""
    if importlib.util.find_spec("vllm") is None:
        raise ValueError("vLLM is not installed here; pip install vllm")
    from normquant.bench.vllm import supervisor

    records: list[dict[str, Any]] = []
    with _folder(args.keep) as folder:
        for found in supervisor.measure(vllm_groups(args, folder), args.timeout, findings):
            if isinstance(found, supervisor.Failure):
                yield found
                continue
            records.append(asdict(found))
            yield [found], vllm_text.line(records[-1])
    yield [], "\n" + vllm_text.summary(records)
    if args.keep:
        print(f"what vLLM generated: normquant audit {args.keep}/SETTING-LINEAR/vllm", file=sys.stderr)


def vllm_groups(args: argparse.Namespace, folder: Path) -> list[list[Job]]:
    """The jobs, in groups that start together. Raises ValueError for arguments that make no sense."""
    from normquant.bench.vllm.seeded_model import config

    settings, linears = _settings(args)
    if min(args.samples, args.steps, args.timeout, args.workers or 1) < 1 or args.samples < 2:
        raise ValueError("--samples starts at 2; --steps, --timeout and --workers start at 1")
    _check_ranks(args)
    jobs = [
        Job(
            setting=setting, linear=linear, layers=args.layers, moe=moe, batches=args.batch, prefill=args.prefill,
            samples=args.samples, steps=args.steps, compared=COMPARED, policy=args.policy, folder="",
            model=config(args.layers, moe, args.tensor_parallel), tensor_parallel=args.tensor_parallel,
            all_reduce=args.all_reduce, products=args.products,
        )
        for moe in args.moe for linear in linears for setting in settings
    ]  # fmt: skip
    jobs = [replace(job, folder=os.fspath(folder / job.name)) for job in jobs]
    size = args.workers or len(settings)
    return [jobs[i : i + size] for i in range(0, len(jobs), size)]


def _check_ranks(args: argparse.Namespace) -> None:
    if args.tensor_parallel not in (1, 2, 4, 8):
        raise ValueError(f"--tensor-parallel is {args.tensor_parallel}; accepted: 1, 2, 4, 8")
    if args.all_reduce and args.tensor_parallel == 1:
        raise ValueError("--all-reduce goes with --tensor-parallel: one GPU reduces nothing")


def _settings(args: argparse.Namespace) -> tuple[Sequence[str], Sequence[str]]:
    """The settings, and the linear kernels of each."""
    if args.settings is None and args.linear is None:
        return INSTALLED, ("installed",)
    if args.as_installed:
        raise ValueError("--as-installed chooses nothing for vLLM; it goes with neither --settings nor --linear")
    settings = chosen(args.settings or ",".join(LABORATORY), (*LABORATORY, "unfused"), "settings")
    return settings, chosen(args.linear or "deepgemm", LINEARS, "linear kernels")


@contextlib.contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    """The folder of vLLM's caches: the one to keep, or a temporary one."""
    if kept:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="normquant-vllm-", ignore_cleanup_errors=True) as name:
        yield Path(name)


def findings(cache: Path) -> dict[str, int]:
    """What the auditor finds in the code in one of vLLM's caches, by rule; nothing if there is no code."""
    from normquant.audit import audit_path

    try:
        reports = audit_path(cache)
    except Exception as error:  # what was measured is worth more than what is said about the code
        print(f"{cache} was not audited: {type(error).__name__}: {error}", file=sys.stderr)
        return {}
    return dict(Counter(finding.rule for report in reports for finding in report.findings))


SUITES = {
    "kernels": kernel_suite,
    "linear": linear_suite,
    "decode": decode_suite,
    "layer": layer_suite,
    "vllm": vllm_suite,
}
