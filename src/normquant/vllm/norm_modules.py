"""vLLM's norm modules as ones that can hand over their quantized form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from normquant.ops._tensors import rows
from normquant.spec import QuantSpec
from normquant.specs import VLLM, VLLM_OPS
from normquant.vllm.handover import differing
from normquant.vllm.producers import Inputs, Producer

WEIGHT_OFFSETS = {"RMSNorm": 0.0, "GemmaRMSNorm": 1.0}
ARITHMETICS = (VLLM, VLLM_OPS, VLLM.replace(rounding="once"), VLLM.replace(sum="rounded"))
TOLERANCE = 1e-3  # of the values: another order of the sum of squares moves 1e-4, another rounding a tenth
ROWS = 64  # that two arithmetics are compared on


@dataclass
class NormModule(Producer):
    """A norm module, of x or of x + residual. weight_offset: 1.0 for Gemma's."""

    weight_offset: float = 0.0

    def inputs(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, *others: Any, **named: Any
    ) -> Inputs | None:
        if others or named:
            return None
        return (x,) if residual is None else (x, residual)

    def call(self, spec: QuantSpec, *inputs: torch.Tensor) -> tuple[str, tuple[Any, ...]]:
        norm = self.module.weight, self.module.variance_epsilon, self.weight_offset, spec.encode()
        x = rows("x", inputs[0])
        if len(inputs) == 1:
            return "rms_norm_quant_with_norm", (x, *norm)
        return "add_rms_norm_quant_with_norm", (x, rows("residual", inputs[1]), *norm)

    def see(self, *inputs: torch.Tensor) -> str:
        few = [rows("x", t)[:ROWS].clone() for t in inputs]
        expected = self.stock(*(t.clone() for t in few))
        total = None
        if len(few) == 2:
            expected, total = expected
        unlike: dict[QuantSpec, int] = {}
        for spec in ARITHMETICS if total is not None else ARITHMETICS[:2]:
            made = self.run(spec, *few)
            if total is not None and made.total is not None and differing(made.total, total):
                return "its sum with the residual is rounded in another way"
            unlike[spec] = differing(made.y, expected)
        best = min(unlike, key=unlike.__getitem__)
        if unlike[best] > TOLERANCE * expected.numel():
            return f"its arithmetic is another: {unlike[best]:,} of {expected.numel():,} values differ"
        self.arithmetic = best
        return ""


def norms(model: nn.Module) -> Iterator[NormModule]:
    """The norms of a model whose arithmetic may be ours: over the whole last dimension, with a weight."""
    for name, module in model.named_modules():
        offset = WEIGHT_OFFSETS.get(type(module).__name__)
        if offset is None or not type(module).__module__.startswith("vllm."):
            continue
        if getattr(module, "variance_size_override", None) is None and getattr(module, "has_weight", True):
            yield NormModule(name, module, module.forward, weight_offset=offset)
