"""``normquant demo``: parse, run the parts with their progress, print, write."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

PACKAGES = {"transformers": "hf", "triton": "nogpu"}  # package -> the extra that brings it
TARGET = "h100"
TOKENS = 64  # a decode batch
CPU_TOKENS = 256
EXIT_FAILED = 1

Progress = Callable[[str], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``normquant demo``."""
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write what was found as JSON")
    parser.add_argument("--html", type=Path, metavar="PATH", help="also write it as one self-contained HTML page")


def run(args: argparse.Namespace) -> int:
    """Run the demonstration; 0 when every norm fused and the values stayed the same, else 1.

    Raises ImportError or OSError, saying what to install or to correct, before anything takes long.
    """
    started = time.monotonic()
    for path in (args.json, args.html):
        check_writable(path)

    def progress(what: str) -> None:
        print(f"[{time.monotonic() - started:5.1f} s] {what}", file=sys.stderr, flush=True)

    progress("loading torch's compiler, triton and transformers")
    require()
    from normquant.demo import page, sections, text

    result = demonstrate(progress)
    found, verdict = sections.sections(result), sections.verdict(result)
    progress("done")
    if args.json:
        args.json.write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
    if args.html:
        args.html.write_text(page.render(found, verdict, _versions()), encoding="utf-8")
    print("\n" + text.render(found, verdict, time.monotonic() - started), end="")
    for path in filter(None, (args.json, args.html)):
        print(f"\nwrote {path}", end="")
    print()
    return 0 if result.exact and result.all_fused else EXIT_FAILED


def demonstrate(progress: Progress) -> Any:
    """All parts in order, as a `demo.result.Result`."""
    from normquant.compile import inductor_options, last_report
    from normquant.demo.codegen import compile_layer
    from normquant.demo.gpu import measure, why_not
    from normquant.demo.layer import R1_TP8, SMALL
    from normquant.demo.outcome import Result

    progress(f"compiling the layer for an {TARGET.upper()}, stock")
    before = compile_layer(R1_TP8, TOKENS, TARGET)
    progress(f"compiling the layer for an {TARGET.upper()}, with normquant")
    after = compile_layer(R1_TP8, TOKENS, TARGET, inductor_options(), fusion=last_report)
    cpu = on_cpu(SMALL, CPU_TOKENS, progress)
    reason = why_not()
    gpu = None if reason else measure(R1_TP8, partial(inductor_options, "always"), progress)
    return Result(R1_TP8, TOKENS, TARGET, before, after, cpu, gpu, reason)


def on_cpu(dims: Any, tokens: int, progress: Progress) -> Any:
    """The small layer on the CPU, as a `demo.result.OnCpu`."""
    from normquant.compile import inductor_options
    from normquant.compile.recording import record
    from normquant.compile.verify import check_sites
    from normquant.demo.layer import build, float64_twin, forward, inputs, relative_error
    from normquant.demo.outcome import OnCpu

    progress("running a small layer on the CPU, fused and unfused")
    layer, tensors = build(dims, "cpu"), inputs(dims, tokens, "cpu")
    recorded = record(forward, (layer, *tensors), inductor_options("always"))  # "auto" fuses only on a GPU
    checks = check_sites(recorded.only)
    progress("running it in float64")
    with torch.no_grad():
        exact = forward(float64_twin(layer), *(t.double() for t in tensors))
    errors = [relative_error(output, exact) for output in (recorded.before, recorded.after)]
    return OnCpu(dims, tokens, checks, *errors)


def require() -> None:
    """Raise ImportError or OSError, in one sentence, where something that the demonstration needs is not there."""
    for package, extra in PACKAGES.items():
        try:
            __import__(package)
        except ImportError as error:
            raise ImportError(
                f"normquant demo needs {package} ({error}); install it with: pip install 'normquant[{extra}]'"
            ) from error
    from normquant.audit.capture import device_guard as deviceguard

    try:
        deviceguard.ensure()
    except RuntimeError as error:
        raise OSError(str(error)) from error


def check_writable(path: Path | None) -> None:
    """Raise OSError for a path that cannot be written to, before a minute is spent on what is to be written."""
    if path is None:
        return
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; the path of a file is accepted")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is not a directory, so {path} cannot be written")


def _versions() -> str:
    import transformers
    import triton

    import normquant

    return ", ".join(
        f"{package.__name__} {package.__version__}" for package in (normquant, torch, triton, transformers)
    )
