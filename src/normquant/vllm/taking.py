"""How readers take forms: with a check where it is asked for, and back to vLLM's own way after any failure."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from normquant.spec import QuantizedActivation
from normquant.vllm.handover import differing, drop, take
from normquant.vllm.quantizing_readers import Reader
from normquant.vllm.switches import Switches

log = logging.getLogger("vllm.normquant")


class Replaced(Protocol):
    """What has the place of one of vLLM's methods. name: of the module."""

    name: str

    def restore(self) -> None:
        """Put vLLM's method back."""


class Taking:
    """What the readers of a model have in common. Failures and stale forms are said once each, by name."""

    def __init__(self, switches: Switches) -> None:
        self.switches = switches
        self._said: set[str] = set()

    def read(self, reader: Reader, *args: Any, **kwargs: Any) -> Any:
        """A reader's call: from the form where it comes with the input, else vLLM's."""
        x = None if torch.compiler.is_compiling() else reader.input(*args, **kwargs)
        form = None if x is None else take(x, reader.spec)
        if x is None or form is None or (self.switches.check and not self._holds(reader, x, form)):
            return reader.stock(*args, **kwargs)
        try:
            return reader.read(form, *args, **kwargs)
        except Exception as error:
            self.give_up(reader, error)
            return reader.stock(*args, **kwargs)

    def give_up(self, each: Replaced, error: Exception) -> None:
        """Give a module its own method back, for good."""
        if self.switches.strict:
            raise error
        each.restore()
        self.say(f"{each.name} goes on as vLLM has it: {type(error).__name__}: {error}")

    def see(self, each: Replaced, look: Callable[[], str], otherwise: str) -> None:
        """Give a module its own method back where `look` says why, or fails; otherwise: what the module does then."""
        try:
            reason = look()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        if reason:
            each.restore()
            self.say(f"{each.name} {otherwise}: {reason}")

    def stale(self, text: str) -> None:
        """Warn of a form that is another than a fresh one, or raise with `strict`."""
        if self.switches.strict:
            raise RuntimeError(f"normquant: {text}")
        self.say(text)

    def say(self, text: str) -> None:
        """Warn, once."""
        if text not in self._said:
            self._said.add(text)
            log.warning("normquant: %s", text)

    def _holds(self, reader: Reader, x: torch.Tensor, form: QuantizedActivation) -> bool:
        """Whether a form is what x gives when it is quantized now. Not asked while a CUDA graph is captured."""
        if is_capturing(x):
            return True
        fresh = reader.fresh(x)
        unlike = unlike_parts((form.data, form.scale), (fresh.data, fresh.scale))
        if not unlike:
            return True
        drop(x if x._base is None else x._base)
        self.stale(f"the form handed to {reader.name} is stale: {unlike}")
        return False


def unlike_parts(
    form: Sequence[torch.Tensor],
    fresh: Sequence[torch.Tensor],
    count: Callable[[torch.Tensor, torch.Tensor], int] = differing,
) -> str:
    """In how many values and scales a form, data and scale, differs from a fresh one, "" where it does in none; waits
    for the GPU. count: `differing_but_nan` where vLLM made the fresh one."""
    values, scales = (count(one, other) for one, other in zip(form, fresh, strict=True))
    return f"{values} values and {scales} scales differ" if values or scales else ""


def is_capturing(x: torch.Tensor) -> bool:
    """Whether what is launched for x now goes into a CUDA graph, so that nothing can be waited for."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
