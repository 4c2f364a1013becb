"""vLLM's norm modules as ones that can hand over their quantized form.

vLLM computes one norm in more than one way: its CUDA ops round once and read the rounded sum, its plain torch rounds
twice and reads the unrounded one. Which of them a module has is seen by running it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from normquant.ops import warmup
from normquant.ops._tensors import rows
from normquant.spec import QuantizedActivation, QuantSpec
from normquant.specs import VLLM, VLLM_OPS
from normquant.vllm.handover import carrying, differing

WEIGHT_OFFSETS = {"RMSNorm": 0.0, "GemmaRMSNorm": 1.0}
ARITHMETICS = (VLLM, VLLM_OPS, VLLM.replace(rounding="once"), VLLM.replace(sum="rounded"))
TOLERANCE = 1e-3  # of the values: another order of the sum of squares moves 1e-4, another rounding a tenth
ROWS = 64  # that two arithmetics are compared on

Normed = tuple[torch.Tensor, torch.Tensor | None, QuantizedActivation]


@dataclass
class NormModule:
    """A norm module. name: its path in the model. weight_offset: 1.0 for Gemma's.

    stock: its own forward. arithmetic: the spec whose norm is the module's, None until it was seen.
    """

    name: str
    module: Any
    weight_offset: float
    stock: Callable[..., Any] = field(repr=False)
    arithmetic: QuantSpec | None = None

    def run(self, x: torch.Tensor, residual: torch.Tensor | None, spec: QuantSpec) -> Normed:
        """The norm [M, K] of x, or of x + residual, that sum in x's shape, and the norm quantized [M, K].

        The norm is a tensor that can carry its form. Nothing is changed in place.
        """
        ours: Any = torch.ops.normquant
        with carrying():
            flat = rows("x", x)
            rest = self.module.weight, self.module.variance_epsilon, self.weight_offset, spec.encode()
            if residual is None:
                data, scale, y = ours.rms_norm_quant_with_norm(flat, *rest)
                return y, None, QuantizedActivation(data, scale, spec)
            data, scale, total, y = ours.add_rms_norm_quant_with_norm(flat, rows("residual", residual), *rest)
            return y, total.view(x.shape), QuantizedActivation(data, scale, spec)

    def see(self, x: torch.Tensor, residual: torch.Tensor | None) -> str:
        """Find the arithmetic by running the module and ours on the first rows of its input; why there is none, or "".

        x and residual stay as they are.
        """
        few = [None if t is None else rows("x", t)[:ROWS].clone() for t in (x, residual)]
        expected = self.stock(*(t.clone() for t in few if t is not None))
        total = None
        if residual is not None:
            expected, total = expected
        unlike: dict[QuantSpec, int] = {}
        for spec in ARITHMETICS if residual is not None else ARITHMETICS[:2]:
            y, our_total, _ = self.run(few[0], few[1], spec)  # type: ignore[arg-type]
            if total is not None and our_total is not None and differing(our_total, total):
                return "its sum with the residual is rounded in another way"
            unlike[spec] = differing(y, expected)
        best = min(unlike, key=unlike.__getitem__)
        if unlike[best] > TOLERANCE * expected.numel():
            return f"its arithmetic is another: {unlike[best]:,} of {expected.numel():,} values differ"
        self.arithmetic = best
        return ""

    def warm_up(self, x: torch.Tensor, residual: torch.Tensor | None, spec: QuantSpec) -> None:
        """Compile what any number of rows may launch, before a request has it or a CUDA graph is captured."""
        if x.is_cuda:
            op = "rms_norm_quant_with_norm" if residual is None else "add_rms_norm_quant_with_norm"
            sizes = {"k": x.shape[-1], "weight_dtype": self.module.weight.dtype, "weight_offset": self.weight_offset}
            warmup(op=op, spec=spec, dtype=x.dtype, device=x.device, **sizes)

    def replace_forward(self, forward: Callable[..., Any]) -> None:
        """Have the module call this, with itself as the first argument, in place of its own forward."""
        self.module.forward = partial(forward, self)

    def restore(self) -> None:
        """Give the module its own forward back."""
        self.module.__dict__.pop("forward", None)


def norms(model: nn.Module) -> Iterator[NormModule]:
    """The norms of a model whose arithmetic may be ours: over the whole last dimension, with a weight."""
    for name, module in model.named_modules():
        offset = WEIGHT_OFFSETS.get(type(module).__name__)
        if offset is None or not type(module).__module__.startswith("vllm."):
            continue
        if getattr(module, "variance_size_override", None) is None and getattr(module, "has_weight", True):
            yield NormModule(name, module, offset, module.forward)
