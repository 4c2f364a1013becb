"""Models that vLLM does not compile: norms hand their quantized form to the block-FP8 products that read them.

No graph is there to be rewritten, so this happens between vLLM's own modules, whose `forward` is replaced on the
instance: a norm quantizes in its kernel and leaves the form with the tensor that it returns (`handover`); a reader
takes it. Which norms, and by which spec, the first forward pass shows (`first_forward`). No file of a model is changed.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from torch import nn

from normquant.compile import FusionReport, Site
from normquant.compile.policy import Facts
from normquant.spec import QuantSpec
from normquant.vllm.first_forward import FirstForward, Seen
from normquant.vllm.handover import fits, leave
from normquant.vllm.norm_modules import NormModule, norms
from normquant.vllm.quantizing_readers import Reader, Unreadable, experts, linears
from normquant.vllm.switches import Switches
from normquant.vllm.taking import Taking

log = logging.getLogger("vllm.normquant")

LARGEST = 1 << 20  # rows; a spec may have one rule for few and one for many
NO_NORM = "its input is no norm's result as it was returned, so that it quantizes it itself"


class HandOver(Taking):
    """The hand-over in one model. report: what it does, once a forward pass was seen."""

    def __init__(self, model: nn.Module, switches: Switches) -> None:
        super().__init__(switches)
        self.norms = list(norms(model))
        found = [*linears(model), *experts(model)]
        self.readers = [reader for reader in found if isinstance(reader, Reader)]
        self.unreadable = [reader for reader in found if isinstance(reader, Unreadable)]
        self.specs: dict[str, QuantSpec] = {}  # norm -> spec of the form that it leaves
        self.report: FusionReport | None = None

    def settle(self, first: FirstForward) -> FusionReport:
        """Decide by what a forward pass showed, and replace the methods of norms and readers that take part."""
        sites: list[Site] = []
        readers: dict[str, Reader] = {}
        for norm in self.norms:
            seen = first.seen.get(norm.name)
            if seen is None or not seen.reads:
                continue
            site, taking = self._decide(norm, seen)
            sites.append(site)
            if site.fused:
                norm.warm_up(_given(seen.x), seen.residual, self.specs[norm.name])
                norm.replace_forward(self._norm)
                readers |= {reader.name: reader for reader in taking}
        for reader in readers.values():
            reader.replace(self.read)
        read = {name for seen in first.seen.values() for name in seen.reads}
        others = [(name, NO_NORM) for name in first.lone if name not in read]
        others += [(reader.name, reader.reason) for reader in self.unreadable]
        stock = tuple(Site(short(name), "", "stock", reason) for name, reason in others)
        self.report = FusionReport(0, self.switches.rules.policy, tuple(sites), stock)
        return self.report

    def kernels(self) -> dict[str, int]:
        """Name of each kernel that quantizes in the model -> how many modules have it."""
        return dict(Counter(type(reader.owner).__name__ for reader in self.readers))

    def undo(self) -> None:
        """Give every module its own method back."""
        for norm in self.norms:
            norm.restore()
        for reader in self.readers:
            reader.restore()

    def _decide(self, norm: NormModule, seen: Seen) -> tuple[Site, list[Reader]]:
        """The site of a norm that readers read, and those of them that will take its form."""
        x, name = _given(seen.x), short(norm.name)
        known: dict[str, Any] = {"k": x.shape[1], "dtype": str(x.dtype).removeprefix("torch."), "m": "any"}
        site = Site(name, type(norm.module).__name__, "stock", "", **known)
        willing = [read.reader for read in seen.reads.values() if not read.reason]
        left = {read.reader.name: read.reason for read in seen.reads.values() if read.reason}
        if not willing:
            return replace(site, reason=_list(norm, left)), []
        arithmetic = norm.arithmetic or QuantSpec()
        spec = willing[0].spec.replace(rounding=arithmetic.rounding, sum=arithmetic.sum)
        op = "rms_norm_quant" if seen.residual is None else "add_rms_norm_quant"
        decision = self.switches.rules.decide(name, Facts(x.device, op, None, x.shape[1], opaque_norm=True))
        if decision.strategy != "fused":
            return replace(site, reason=decision.reason, spec=spec.encode()), []
        taking = [reader for reader in willing if any(fits(spec, reader.spec, m) for m in (1, LARGEST))]
        left |= {reader.name: "it quantizes by another rule" for reader in willing if reader not in taking}
        to = ", ".join(_beside(norm.name, reader.name) for reader in taking)
        reason = f"{decision.reason}; handed to {to}" + (f"; not to {_list(norm, left)}" if left else "")
        self.specs[norm.name] = spec
        site = replace(site, strategy="fused", reason=reason, op=op, spec=spec.encode(), kernels_saved=len(taking))
        return site, taking

    def _norm(self, norm: NormModule, x: torch.Tensor, residual: torch.Tensor | None = None, **others: Any) -> Any:
        """A norm's call: ours, its form left with what it returns; vLLM's for a call that is not as the first was."""
        rest = () if residual is None else (residual,)
        if others or torch.compiler.is_compiling():
            return norm.stock(x, *rest, **others)
        try:
            y, total, form = norm.run(x, residual, self.specs[norm.name])
        except Exception as error:
            self.give_up(norm, error)
            return norm.stock(x, *rest)
        leave(y, form)
        y = y if x.dim() == 2 else y.view(x.shape)
        return y if total is None else (y, total)


def watch(model: nn.Module, switches: Switches, done: Callable[[HandOver], None]) -> HandOver:
    """Have the next forward pass of a model watched, and its norms hand over from then on.

    done: called when that is settled. A pass that is captured into a CUDA graph, or raises by itself, is not the one.
    """
    hand_over, stock = HandOver(model, switches), model.forward

    @wraps(stock)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return stock(*args, **kwargs)
        first = FirstForward(hand_over.norms, hand_over.readers)
        try:
            with first:
                result = stock(*args, **kwargs)
        except Exception as error:
            result = stock(*args, **kwargs)  # raises if it was not for us, and the next pass is watched
            return _leave(model, hand_over, error, result)
        try:
            model.__dict__.pop("forward")
            hand_over.settle(first)
            done(hand_over)
        except Exception as error:
            return _leave(model, hand_over, error, result)
        return result

    model.forward = forward
    return hand_over


def _leave(model: nn.Module, hand_over: HandOver, error: Exception, result: Any) -> Any:
    """Give a model back as it was, with a warning, and return the result of its forward pass."""
    model.__dict__.pop("forward", None)
    hand_over.undo()
    if hand_over.switches.strict:
        raise error
    log.warning("normquant leaves the model as it was: %s: %s", type(error).__name__, error)
    return result


def short(name: str) -> str:
    """A module's path as a compiled graph has it, without the model's own name."""
    return name.removeprefix("language_model.").removeprefix("model.")


def _list(norm: NormModule, reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{_beside(norm.name, name)}: {reason}" for name, reason in reasons.items())


def _beside(norm: str, reader: str) -> str:
    """A reader's path from the layer that it has in common with a norm on."""
    parts = reader.split(".")
    common = next((i for i, (a, b) in enumerate(zip(norm.split("."), parts, strict=False)) if a != b), 0)
    return ".".join(parts[common:])


def _given(x: torch.Tensor | None) -> torch.Tensor:
    assert x is not None
    return x
