"""Fuse the norms of a real DeepSeek-V3 layer, and show what changes: the generated code, the values, the time."""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path

from normquant.cli.output_files import check_writable, write_atomically
from normquant.cli.progress import Progress, add_quiet, showing

PACKAGES = {"transformers": "hf", "triton": "nogpu"}  # package -> the extra that brings it
EXIT_FAILED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``normquant demo``."""
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write what was found as JSON")
    parser.add_argument("--html", type=Path, metavar="PATH", help="also write it as one self-contained HTML page")
    add_quiet(parser)


def run(args: argparse.Namespace) -> int:
    """Run the demonstration; 0 when every norm fused and the values stayed the same, else 1.

    Raises ImportError or OSError, saying what to install or to correct, before anything takes long.
    """
    started = time.monotonic()
    check_writable(args.json, args.html)

    with showing(1, args.quiet, ticking=True, eager=True) as progress:
        progress.begin("loading torch's compiler, triton and transformers")
        require()
        from normquant.demo import demonstration, render, sections
    with showing(demonstration.steps(), args.quiet, ticking=True, eager=True) as progress:
        result = demonstration.demonstrate(partial(_next, progress))
        progress.step()
        progress.begin("done")
    found, verdict = sections.sections(result), sections.verdict(result)
    if args.json:
        write_atomically(args.json, json.dumps(result.to_dict(), indent=2) + "\n")
    if args.html:
        reports = result.before.report.to_dict(), result.after.report.to_dict()
        write_atomically(args.html, render.as_html(reports, found, verdict, _versions()))
    print("\n" + render.as_text(found, verdict, time.monotonic() - started), end="")
    for path in filter(None, (args.json, args.html)):
        print(f"\nwrote {path}", end="")
    print()
    return 0 if result.exact and result.all_fused else EXIT_FAILED


def _next(progress: Progress, what: str) -> None:
    """The step before, if there was one, is done; this one begins."""
    progress.step(bool(progress.doing))
    progress.begin(what)


def require() -> None:
    """Raise ImportError or OSError, in one sentence, if something that the demonstration needs is missing."""
    for package, extra in PACKAGES.items():
        try:
            __import__(package)
        except ImportError as error:
            raise ImportError(
                f"normquant demo needs {package} ({error}); install it with: pip install 'normquant[{extra}]'"
            ) from error
    from normquant.audit.capture import fake_gpu

    try:
        fake_gpu.ensure_device_guard()
    except RuntimeError as error:
        raise OSError(str(error)) from error


def _versions() -> str:
    import torch
    import transformers
    import triton

    import normquant

    packages = (normquant, torch, triton, transformers)
    return ", ".join(f"{package.__name__} {package.__version__}" for package in packages)
