"""vLLM's modules whose result one of our ops gives, quantized beside it: what all of them have in common.

vLLM computes one module in more than one way: its CUDA ops round where its plain torch does not, and the other way
round. Which arithmetic a module has is seen by running it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch

from normquant.ops import OPS, warmup
from normquant.ops._op import call_beside
from normquant.ops._tensors import shaped
from normquant.spec import QuantizedActivation, QuantSpec
from normquant.vllm.handover import carrying
from normquant.vllm.methods import give_back

Inputs = tuple[torch.Tensor, ...]


class Made(NamedTuple):
    """What our op gives for a module.

    y: the module's result [M, K], which can carry a form. form: y quantized [M, K].
    total: the sum with a residual, in the shape of the module's input; None where there is no residual.
    """

    y: torch.Tensor
    form: QuantizedActivation
    total: torch.Tensor | None = None

    def returned(self, x: torch.Tensor) -> Any:
        """What the module returns for its first input x [..., *]."""
        y = shaped(self.y, x)
        return y if self.total is None else (y, self.total)


@dataclass
class Producer(ABC):
    """A module. name: its path in the model. stock: its own forward.

    arithmetic: the spec whose rounding and sum are the module's, None until it was seen.
    """

    name: str
    module: Any
    stock: Callable[..., Any] = field(repr=False)
    arithmetic: QuantSpec | None = None

    @abstractmethod
    def inputs(self, *args: Any, **kwargs: Any) -> Inputs | None:
        """The tensors of a call, x first; None for a call that is given more than our op computes from."""

    @abstractmethod
    def call(self, spec: QuantSpec, *inputs: torch.Tensor) -> tuple[str, tuple[Any, ...]]:
        """The op, whose last output is the module's result, and its arguments for inputs [..., *]."""

    @abstractmethod
    def see(self, *inputs: torch.Tensor) -> str:
        """Find the arithmetic by running the module and our op; why there is none, or "". Inputs stay as they are."""

    def run(self, spec: QuantSpec, *inputs: torch.Tensor) -> Made:
        """What our op gives for these inputs. Nothing is changed in place."""
        op, args = self.call(spec, *inputs)
        call = call_beside(inputs[0], OPS[op].overload)
        with carrying():
            data, scale, *total, y = call(*args)
            residual_sum = shaped(total[0], inputs[0]) if total else None
        return Made(y, QuantizedActivation(data, scale, spec), residual_sum)

    def warm_up(self, spec: QuantSpec, *inputs: torch.Tensor) -> None:
        """Compile what any number of rows may launch, before a request has it or a CUDA graph is captured."""
        op, args = self.call(spec, *inputs)
        if inputs[0].is_cuda:
            warmup(**OPS[op].warmup_settings(*args))

    def replace_forward(self, forward: Callable[..., Any]) -> None:
        """Have the module call this, with itself as the first argument, in place of its own forward."""
        self.module.forward = partial(forward, self)

    def restore(self) -> None:
        """Give the module its own forward back."""
        give_back(self.module, "forward", self.stock)
