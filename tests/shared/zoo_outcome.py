"""What becomes of a tiny model whose linear layers are block-FP8 and whose graphs the pass rewrites.

The graphs run without a code generator (`pass_harness`), so what differs is the arithmetic of the rewrite. Where a
model gives other values than eager, the same graphs without a rewrite say whether torch.compile is the cause.
"""

from __future__ import annotations

import inspect
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from shared.compare import bits
from shared.pass_harness import Outcome, run_with_pass
from shared.zoo import TinyModel, tokens

from normquant.compile.policy import Rules
from normquant.linear import convert_linears

Run = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class ZooOutcome:
    """One model. sites: norm -> quantization sites in its graphs. differ: values of the logits, of `values`, that are
    not eager's; more_than_stock: of these, the ones that the graphs without a rewrite have as eager does.
    unfused: reason -> sites. not_run: why there is nothing to compare. failure: what breaks the promise, else "".
    """

    name: str
    converted: int = 0
    sites: int = 0
    fused: int = 0
    values: int = 0
    differ: int = 0
    more_than_stock: int = 0
    unfused: dict[str, int] = field(default_factory=dict)
    not_run: str = ""
    failure: str = ""


class _OutOfTime(BaseException):
    """No Exception: what asks for exceptions of a model must not take this for one."""


def zoo_outcome(tiny: TinyModel, seconds: int = 240) -> ZooOutcome:
    """Build, convert, compile and compare one model. What goes wrong is in the outcome."""
    try:
        with _time_limit(seconds):
            return _outcome(tiny)
    except _OutOfTime:
        return ZooOutcome(tiny.name, not_run=f"took longer than {seconds} s")


def _outcome(tiny: TinyModel) -> ZooOutcome:
    try:
        model = tiny.build()
        ids = tokens()
        plain = _logits(model)(ids)
    except Exception as error:
        return ZooOutcome(tiny.name, not_run=f"transformers: {_one_line(error)}")
    if not torch.equal(bits(plain), bits(_logits(model)(ids))):
        return ZooOutcome(tiny.name, not_run="its eager values change from run to run")
    try:
        model, report = convert_linears(model)
        expected = _logits(model)(ids)
    except Exception as error:
        return ZooOutcome(tiny.name, failure=f"converted, it does not run: {_one_line(error)}")
    return _compared(tiny.name, len(report.converted), _logits(model), ids, expected)


def _compared(name: str, converted: int, run: Run, ids: torch.Tensor, expected: torch.Tensor) -> ZooOutcome:
    try:
        fused = _compiled(run, ids, "always")
    except Exception as error:
        return _uncompiled(name, converted, run, ids, error)
    wrong = bits(fused.result) != bits(expected)
    more = wrong & (bits(_compiled(run, ids, "never").result) == bits(expected)) if wrong.any() else wrong
    unfused = Counter(site.reason for site in fused.sites if not site.fused)
    failure = f"{int(more.sum())} values differ only where sites are fused" if more.any() else ""
    counts = converted, len(fused.sites), len(fused.fused), wrong.numel(), int(wrong.sum()), int(more.sum())
    return ZooOutcome(name, *counts, unfused=dict(unfused), failure=failure)


def _uncompiled(name: str, converted: int, run: Run, ids: torch.Tensor, error: Exception) -> ZooOutcome:
    """A compile that fails is ours unless the graphs without a rewrite fail as well."""
    try:
        _compiled(run, ids, "never")
    except Exception as stock:
        return ZooOutcome(name, converted, not_run=f"stock torch.compile: {_one_line(stock)}")
    return ZooOutcome(name, converted, failure=f"compiled, it does not run: {_one_line(error)}")


def _compiled(run: Run, ids: torch.Tensor, policy: Any) -> Outcome:
    return run_with_pass(run, ids, rules=Rules(policy), fullgraph=False)


def _logits(model: torch.nn.Module) -> Run:
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}

    @torch.no_grad()
    def run(ids: torch.Tensor) -> torch.Tensor:
        return model(ids, **options).logits

    return run


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def expired(*_: Any) -> None:
        raise _OutOfTime

    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _one_line(error: Exception) -> str:
    cause = getattr(error, "inner_exception", None) or error.__cause__ or error
    text = next((line.strip() for line in str(cause).splitlines() if line.strip()), "")
    return f"{type(cause).__name__}: {text[:120]}".removesuffix(": ")
