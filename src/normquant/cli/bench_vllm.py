"""`normquant bench vllm`: vLLM serving a shard of DeepSeek-R1, each setting in processes of its own."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normquant.bench.vllm.job import INSTALLED, LABORATORY, LINEARS, Job
from normquant.cli.arguments import POLICIES, PRODUCTS, chosen, integers
from normquant.report import vllm_text

if TYPE_CHECKING:
    from normquant.bench.records import Record
    from normquant.bench.vllm.supervisor import Failure

STEPS = 32  # decode steps of a sample
COMPARED = 32  # prompts whose logits are compared


def expert_layers(text: str) -> tuple[int, ...]:
    """'0,4' -> (0, 4), an argparse type; unlike other sizes, these start at 0."""
    return tuple(0 if part == "0" else integers(part)[0] for part in text.split(","))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `normquant bench vllm`."""
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
    add(
        "--uncompiled",
        action="store_true",
        help="vLLM as it runs newer models: not compiled, its decode steps captured",
    )
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
        "--products", default="auto",
        help="whether normquant's products of few rows take the place of vLLM's: auto, where measured (default), "
        "always or never; of several, such as auto,never, each is a setting",
    )  # fmt: skip
    add("--workers", type=int, help="processes that start together (default: those of one model and linear)")
    add("--timeout", type=float, default=900, metavar="S", help="of a start, of a measurement (default: 900)")
    add("--keep", type=Path, metavar="DIR", help="keep vLLM's caches, reports, logs and kernels here")


def suite(args: argparse.Namespace) -> Iterator[tuple[Sequence[Record], str] | Failure]:
    """Each setting at each batch: its record and a line about it, or the failure of its process; at the end a table."""
    if importlib.util.find_spec("vllm") is None:
        raise ValueError("vLLM is not installed here; pip install vllm")
    from normquant.bench.vllm import supervisor

    records: list[dict[str, Any]] = []
    with _folder(args.keep) as folder:
        for found in supervisor.measure(groups(args, folder), args.timeout, findings):
            if isinstance(found, supervisor.Failure):
                yield found
                continue
            records.append(asdict(found))
            yield [found], vllm_text.line(records[-1])
    yield [], "\n" + vllm_text.summary(records)
    if args.keep:
        print(f"what vLLM generated: normquant audit {args.keep}/SETTING-LINEAR/vllm", file=sys.stderr)


def groups(args: argparse.Namespace, folder: Path) -> list[list[Job]]:
    """The jobs, in groups that start together. Raises ValueError for arguments that make no sense."""
    from normquant.bench.vllm.seeded_model import config

    settings, linears = _settings(args)
    if min(args.samples, args.steps, args.timeout, args.workers or 1) < 1 or args.samples < 2:
        raise ValueError("--samples starts at 2; --steps, --timeout and --workers start at 1")
    _check_ranks(args)
    products = chosen(args.products, PRODUCTS, "products")
    jobs = [
        Job(
            setting=setting, linear=linear, layers=args.layers, moe=moe, batches=args.batch, prefill=args.prefill,
            samples=args.samples, steps=args.steps, compared=COMPARED, policy=args.policy, folder="",
            model=config(args.layers, moe, args.tensor_parallel), tensor_parallel=args.tensor_parallel,
            all_reduce=args.all_reduce, products=rule, compiled=not args.uncompiled,
        )
        for moe in args.moe for linear in linears for setting in settings
        for rule in (products if setting.endswith("normquant") else products[:1])
    ]  # fmt: skip
    jobs = [replace(job, folder=os.fspath(folder / job.name)) for job in jobs]
    size = args.workers or len(jobs) // (len(args.moe) * len(linears))
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
