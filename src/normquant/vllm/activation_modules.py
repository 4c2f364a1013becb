"""vLLM's gated activation modules as ones that can hand over their quantized form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from normquant.ops._tensors import rows
from normquant.spec import QuantSpec
from normquant.specs import VLLM
from normquant.vllm.handover import differing
from normquant.vllm.producers import Inputs, Producer

GATED = "SiluAndMul"  # silu(gate) * up; others clamp, shift or have another function
ARITHMETICS = (VLLM, VLLM.replace(rounding="once"))
PATTERNS = 1 << 16  # of 16 bits
STEP = 40503  # odd, so that its multiples, too, go through all patterns


@dataclass
class ActivationModule(Producer):
    """A gated product, silu(gate) * up of x [..., 2K].

    No sum is in it, so that its values have to be the module's to the bit, for every gate that there is.
    """

    def inputs(self, x: torch.Tensor, *others: Any, **named: Any) -> Inputs | None:
        return None if others or named else (x,)

    def call(self, spec: QuantSpec, *inputs: torch.Tensor) -> tuple[str, tuple[Any, ...]]:
        return "silu_mul_quant_with_product", (rows("x", inputs[0]), None, spec.encode())

    def see(self, *inputs: torch.Tensor) -> str:
        every = every_gate(inputs[0])
        expected = self.stock(every.clone())
        unlike = {spec: differing(self.run(spec, every).y, expected) for spec in ARITHMETICS}
        best = min(unlike, key=unlike.__getitem__)
        if unlike[best]:
            return f"its arithmetic is another: {unlike[best]:,} of {expected.numel():,} values differ"
        self.arithmetic = best
        return ""


def every_gate(x: torch.Tensor) -> torch.Tensor:
    """Rows like those of x [..., 2K], 16 bits a value: every gate at least once, each with another up."""
    k = x.shape[-1] // 2
    n = torch.arange(-(-PATTERNS // k) * k, device=x.device)
    halves = [bits.to(torch.int16).view(x.dtype).view(-1, k) for bits in (n, n * STEP)]  # the low 16 bits
    return torch.cat(halves, dim=1)


def activations(model: nn.Module) -> Iterator[ActivationModule]:
    """The gated products of a model that ours may be."""
    for name, module in model.named_modules():
        if type(module).__name__ == GATED and type(module).__module__.startswith("vllm."):
            yield ActivationModule(name, module, module.forward)
