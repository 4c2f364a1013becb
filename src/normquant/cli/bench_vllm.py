"""`normquant bench vllm`: its options, and what is printed while it runs and at its end."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args

from normquant.bench.records import Record, VllmRecord, writing
from normquant.bench.vllm.job import LINEARS, SETTINGS, Job
from normquant.bench.vllm.settings import Failure, measure
from normquant.bench.vllm.shard_model import config
from normquant.cli.arguments import integers
from normquant.compile.policy import Policy
from normquant.report.vllm_text import line, summary

STEPS = 32  # of a window
COMPARED = 32  # prompts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `normquant bench vllm`, but for --output."""
    parser.add_argument(
        "--settings",
        default=",".join(SETTINGS),
        help=f"comma-separated (default: {','.join(SETTINGS)}); also unfused, vLLM without its fused silu either",
    )
    parser.add_argument("--linear", default="deepgemm", help="deepgemm, cutlass, or both (default: deepgemm)")
    parser.add_argument("--layers", type=int, default=16, help="decoder layers (default: 16)")
    parser.add_argument(
        "--moe",
        type=models,
        default=(0,),
        metavar="N,...",
        help="how many of them, the last ones, have 256 experts; a model for each number (default: 0)",
    )
    parser.add_argument(
        "--batch", type=integers, default=(1, 16, 64), metavar="N,...", help="requests (default: 1,16,64)"
    )
    parser.add_argument(
        "--prefill", type=integers, default=(2048, 8192), metavar="N,...", help="prompts (default: 2048,8192 tokens)"
    )
    parser.add_argument("--samples", type=int, default=5, help="samples of each timing (default: 5)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"decode steps of a sample (default: {STEPS})")
    parser.add_argument("--policy", default="auto", choices=get_args(Policy), help="of normquant (default: auto)")
    parser.add_argument(
        "--workers", type=int, help="processes that start together (default: those of one model and linear)"
    )
    parser.add_argument(
        "--timeout", type=float, default=900, metavar="S", help="of a start, of a measurement (default: 900)"
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep vLLM's caches, reports, logs and kernels here")


def run(args: argparse.Namespace) -> int:
    """Measure, print a line a record, write the records; 1 if a process failed."""
    if importlib.util.find_spec("vllm") is None:
        raise ValueError("vLLM is not installed here; pip install vllm")
    start = time.monotonic()
    records: list[VllmRecord] = []
    failed = False
    with folder(args.keep) as directory, writing(args.output) if args.output else nullcontext(len) as add:
        for result in measure(groups(args, directory), args.timeout, findings):
            if isinstance(result, Failure):
                failed = True
                print(f"{result.job.name} failed {result.reason}\n{result.log}", file=sys.stderr, flush=True)
                continue
            new: list[Record] = [result]
            add(new)
            records.append(result)
            print(line(asdict(result)), flush=True)
    print("\n" + summary([asdict(r) for r in records]))
    if args.keep:
        print(f"what vLLM generated: normquant audit {args.keep}/SETTING-LINEAR/vllm", file=sys.stderr)
    print(f"{len(records)} records in {time.monotonic() - start:.0f} s", file=sys.stderr)
    return 1 if failed else 0


@contextlib.contextmanager
def folder(kept: Path | None) -> Iterator[Path]:
    """The folder of the caches: the one to keep, or one that goes away."""
    if kept:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="normquant-vllm-", ignore_cleanup_errors=True) as name:
        yield Path(name)


def groups(args: argparse.Namespace, directory: Path) -> list[list[Job]]:
    """The jobs, in groups that start together. Raises ValueError for arguments that are none."""
    settings, linears = chosen(args.settings, (*SETTINGS, "unfused")), chosen(args.linear, LINEARS)
    if min(args.samples, args.steps, args.timeout, args.workers or 1) < 1 or args.samples < 2:
        raise ValueError("--samples starts at 2; --steps, --timeout and --workers start at 1")
    jobs = [
        Job(
            setting,
            linear,
            args.layers,
            moe,
            args.batch,
            args.prefill,
            args.samples,
            args.steps,
            COMPARED,
            args.policy,
            "",
            config(args.layers, moe),
        )
        for moe in args.moe
        for linear in linears
        for setting in settings
    ]
    jobs = [replace(job, folder=os.fspath(directory / job.name)) for job in jobs]
    size = args.workers or len(settings)
    return [jobs[i : i + size] for i in range(0, len(jobs), size)]


def models(text: str) -> tuple[int, ...]:
    """'0,4' -> (0, 4), an argparse type; a model has no layer with experts or some."""
    return tuple(0 if part == "0" else integers(part)[0] for part in text.split(","))


def chosen(text: str, known: Sequence[str]) -> list[str]:
    """'a,b' -> ["a", "b"]; raises ValueError for what is not known."""
    names = text.split(",")
    if unknown := set(names) - set(known):
        raise ValueError(f"unknown {', '.join(sorted(unknown))}; accepted: {', '.join(known)}")
    return names


def findings(cache: Path) -> dict[str, int]:
    """What the auditor finds in the code that lies in a cache of vLLM, by rule; nothing where no code is."""
    from normquant.audit import audit_path

    try:
        reports = audit_path(cache)
    except Exception as error:  # what was measured is worth more than what is said about the code
        print(f"{cache} was not audited: {type(error).__name__}: {error}", file=sys.stderr)
        return {}
    return dict(Counter(finding.rule for report in reports for finding in report.findings))
