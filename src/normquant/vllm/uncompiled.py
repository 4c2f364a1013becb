"""Models that vLLM does not compile: norms and gated products hand their quantized form to the block-FP8 products that
read them.

No graph is there to be rewritten, so this happens between vLLM's own modules, whose `forward` is replaced on the
instance: a producer quantizes in its kernel and leaves the form with the tensor that it returns (`handover`); a reader
takes it. Which producers, and by which spec, the first forward pass shows (`first_forward`). No file of a model is
changed.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from torch import nn

from normquant.compile import FusionReport, Site
from normquant.compile.policy import Facts
from normquant.ops import OPS
from normquant.spec import QuantSpec
from normquant.vllm.activation_modules import activations
from normquant.vllm.first_forward import FirstForward, Seen
from normquant.vllm.handover import fits, leave
from normquant.vllm.module_paths import beside, short
from normquant.vllm.norm_modules import NormModule, norms
from normquant.vllm.producers import Producer
from normquant.vllm.quantizing_readers import Reader, Unreadable, experts, linears
from normquant.vllm.switches import Switches
from normquant.vllm.taking import Taking

log = logging.getLogger("vllm.normquant")

LARGEST = 1 << 20  # rows; a spec may have one rule for few and one for many
NOT_CALLED = "the first forward pass did not call it"
NOT_READ = "in the first forward pass no block-FP8 linear and no experts read the tensor that it returned"


class HandOver(Taking):
    """The hand-over in one model. report: what it does, once a forward pass was seen."""

    def __init__(self, model: nn.Module, switches: Switches) -> None:
        super().__init__(switches)
        self.producers: list[Producer] = [*norms(model), *activations(model)]
        found = [*linears(model), *experts(model)]
        self.readers = [reader for reader in found if isinstance(reader, Reader)]
        self.unreadable = [reader for reader in found if isinstance(reader, Unreadable)]
        self.specs: dict[str, QuantSpec] = {}  # producer -> spec of the form that it leaves
        self.report: FusionReport | None = None

    def settle(self, first: FirstForward) -> FusionReport:
        """Decide by what a forward pass showed, and replace the methods of producers and readers that take part."""
        sites: list[Site] = []
        readers: dict[str, Reader] = {}
        for producer in self.producers:
            seen = first.seen.get(producer.name)
            if seen is None or seen.y is None or not seen.reads:
                continue
            site, taking = self._decide(producer, seen, seen.y)
            sites.append(site)
            if site.fused:
                producer.warm_up(self.specs[producer.name], *seen.inputs)
                producer.replace_forward(self._produce)
                readers |= {reader.name: reader for reader in taking}
        for reader in readers.values():
            reader.replace(self.read)
        others = tuple(Site(short(name), "", "stock", reason) for name, reason in self._others(first))
        self.report = FusionReport(0, self.switches.rules.policy, tuple(sites), others)
        return self.report

    def _others(self, first: FirstForward) -> Iterator[tuple[str, str]]:
        """Name and reason of every producer that nobody reads, and of every reader that reads no producer."""
        for producer in self.producers:
            seen = first.seen.get(producer.name)
            if seen is None or not seen.reads:
                yield producer.name, NOT_CALLED if seen is None else seen.reason or NOT_READ
        read = {name for seen in first.seen.values() for name in seen.reads}
        for reader in self.readers:
            if reader.name not in read:
                yield reader.name, first.lone.get(reader.name, NOT_CALLED)
        yield from ((reader.name, reader.reason) for reader in self.unreadable)

    def kernels(self) -> dict[str, int]:
        """Name of each kernel that quantizes in the model -> how many modules have it."""
        return dict(Counter(type(reader.owner).__name__ for reader in self.readers))

    def undo(self) -> None:
        """Give every module its own method back."""
        for producer in self.producers:
            producer.restore()
        for reader in self.readers:
            reader.restore()

    def _decide(self, producer: Producer, seen: Seen, y: torch.Tensor) -> tuple[Site, list[Reader]]:
        """The site of a producer that readers read, and those of them that will take its form; y: like its result."""
        name, arithmetic = short(producer.name), producer.arithmetic or QuantSpec()
        known: dict[str, Any] = {"k": y.shape[1], "dtype": str(y.dtype).removeprefix("torch."), "m": "any"}
        site = Site(name, type(producer.module).__name__, "stock", "", **known)
        willing = [read.reader for read in seen.reads.values() if not read.reason]
        left = {read.reader.name: read.reason for read in seen.reads.values() if read.reason}
        if not willing:
            return replace(site, reason=_list(producer, left)), []
        spec = willing[0].spec.replace(rounding=arithmetic.rounding, sum=arithmetic.sum)
        op = OPS[producer.call(spec, *seen.inputs)[0]].stem
        facts = Facts(y.device, op, None, y.shape[1], opaque_norm=isinstance(producer, NormModule))
        decision = self.switches.rules.decide(name, facts)
        if decision.strategy != "fused":
            return replace(site, reason=decision.reason, spec=spec.encode()), []
        taking = [reader for reader in willing if any(fits(spec, reader.spec, m) for m in (1, LARGEST))]
        left |= {reader.name: "it quantizes by another rule" for reader in willing if reader not in taking}
        to = ", ".join(beside(producer.name, reader.name) for reader in taking)
        reason = f"{decision.reason}; handed to {to}" + (f"; not to {_list(producer, left)}" if left else "")
        self.specs[producer.name] = spec
        site = replace(site, strategy="fused", reason=reason, op=op, spec=spec.encode(), kernels_saved=len(taking))
        return site, taking

    def _produce(self, producer: Producer, *args: Any, **kwargs: Any) -> Any:
        """A producer's call: ours, its form left with what it returns; vLLM's for a call with more than ours takes."""
        inputs = None if torch.compiler.is_compiling() else producer.inputs(*args, **kwargs)
        if inputs is None:
            return producer.stock(*args, **kwargs)
        try:
            made = producer.run(self.specs[producer.name], *inputs)
        except Exception as error:
            self.give_up(producer, error)
            return producer.stock(*args, **kwargs)
        leave(made.y, made.form)
        return made.returned(inputs[0])


def watch(model: nn.Module, switches: Switches, done: Callable[[HandOver], None]) -> HandOver:
    """Have the next forward pass of a model watched, and its norms and gated products hand over from then on.

    done: called when that is settled. A pass that is captured into a CUDA graph, or raises by itself, is not the one.
    """
    hand_over, stock = HandOver(model, switches), model.forward

    @wraps(stock)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return stock(*args, **kwargs)
        first = FirstForward(model, hand_over.producers, hand_over.readers)
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


def _list(producer: Producer, reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{beside(producer.name, name)}: {reason}" for name, reason in reasons.items())
