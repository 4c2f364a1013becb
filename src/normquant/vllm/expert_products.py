"""The gated product inside of routed experts and its quantization: one kernel where vLLM has two.

vLLM's Triton experts have both in one, but not where scales are powers of two, which that kernel does not give. There
`activation` writes the product into a tensor, and the next statement quantizes this tensor. Here `activation` does
both, and the quantization takes the form if it is asked for this very tensor, next and in the same thread. The tensor
holds what it always did. The first call computes both ways, and vLLM's stay where a bit differs.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import nn

from normquant.compile.policy import Facts
from normquant.ops import OPS, warmup
from normquant.ops._op import Launcher, cached
from normquant.spec import QuantSpec
from normquant.vllm.activation_modules import ARITHMETICS, every_gate
from normquant.vllm.handover import differing_but_nan
from normquant.vllm.methods import give_back
from normquant.vllm.quantizing_readers import experts_rule, quantizes_in_blocks
from normquant.vllm.switches import Switches
from normquant.vllm.taking import Taking, is_capturing, unlike_parts

EXPERTS, QUANTIZE = "TritonExperts", "moe_kernel_quantize_input"
PRODUCT = "silu_mul_quant_with_product"
RULE = {"quant_dtype": torch.float8_e4m3fn, "per_act_token_quant": False, "block_shape": [128, 128]}
KEPT = "keeps vLLM's gated product"
_left = threading.local()  # form: the tensor that was written last, its data and its scales


@dataclass
class ExpertProduct:
    """The gated product of one layer's experts. name: of the layer. owner: vLLM's experts. stock: their `activation`.

    quantize: vLLM's function that quantizes what `activation` wrote. spec: None until the first call was compared.
    """

    name: str
    owner: Any = field(repr=False)
    stock: Callable[..., None] = field(repr=False)
    quantize: Callable[..., Any] = field(repr=False)
    spec: QuantSpec | None = None

    def takes(self, activation: Any, output: torch.Tensor, x: torch.Tensor, others: dict[str, Any]) -> bool:
        """Whether a call is silu(gate) * up of all rows of x [M, 2K], into output [M, K], and nothing else."""
        if getattr(activation, "value", activation) != "silu" or any(value is not None for value in others.values()):
            return False
        if getattr(getattr(self.owner, "activation_config", None), "clamp_limit", None) is not None:
            return False
        plain = x.dim() == 2 and x.is_contiguous() and output.is_contiguous() and x.numel() > 0
        return plain and output.dtype == x.dtype and output.shape == (x.shape[0], x.shape[1] // 2)

    def see(self, activation: Any, x: torch.Tensor) -> str:
        """Find the spec that gives what vLLM gives, for every gate; why there is none, or ""."""
        every = every_gate(x)
        expected = every.new_empty((every.shape[0], every.shape[1] // 2))
        self.stock(activation, expected, every)
        data, scale = self.quantize(expected, None, **RULE)
        for arithmetic in ARITHMETICS:
            spec = experts_rule().replace(rounding=arithmetic.rounding)
            made = OPS[PRODUCT].overload(every, None, spec.encode())
            pairs = list(zip(made, (data, scale, expected), strict=True))
            if all(a.stride() == b.stride() and not differing_but_nan(a, b) for a, b in pairs):
                self.spec = spec
                if x.is_cuda:
                    warmup(**OPS[PRODUCT].warmup_settings(x, None, spec.encode()))
                return ""
        return "its product or the quantization has another arithmetic"

    def run(self, output: torch.Tensor, x: torch.Tensor) -> None:
        """Write the product, and leave its form for the quantization."""
        assert self.spec is not None
        if x.is_cuda:
            data, scale = _write(x, output, self.spec.encode())
        else:
            data, scale, y = OPS[PRODUCT].overload(x, None, self.spec.encode())
            output.copy_(y)
        _left.form = output, data, scale

    def restore(self) -> None:
        """Give vLLM's experts their own method back."""
        give_back(self.owner, "activation", self.stock)


class ExpertProducts(Taking):
    """Those of one model."""

    def __init__(self, model: nn.Module, switches: Switches) -> None:
        super().__init__(switches)
        for each in expert_products(model):
            _take_forms(sys.modules[type(each.owner).__module__])
            each.owner.activation = self._replacement(each)

    def _replacement(self, each: ExpertProduct) -> Callable[..., None]:
        @wraps(each.stock)
        def activation(kind: Any, output: torch.Tensor, input: torch.Tensor, **others: Any) -> None:
            if torch.compiler.is_compiling() or not each.takes(kind, output, input, others):
                return each.stock(kind, output, input, **others)
            if each.spec is None:
                return self._first(each, kind, output, input)
            try:
                each.run(output, input)
            except Exception as error:
                self.give_up(each, error)
                return each.stock(kind, output, input)
            if self.switches.check and not is_capturing(input):
                self._compare(each, output)
            return None

        return activation

    def _first(self, each: ExpertProduct, kind: Any, output: torch.Tensor, x: torch.Tensor) -> None:
        def look() -> str:
            facts = Facts(x.device, "silu_mul_quant", None, x.shape[1] // 2, opaque_norm=False)
            decision = self.switches.rules.decide(each.name, facts)
            return each.see(kind, x) if decision.strategy == "fused" else decision.reason

        if not is_capturing(x):
            self.see(each, look, KEPT)
        each.stock(kind, output, x)

    def _compare(self, each: ExpertProduct, output: torch.Tensor) -> None:
        _, *form = _left.form
        if unlike := unlike_parts(form, each.quantize(output, None, **RULE), differing_but_nan):
            del _left.form
            self.stale(f"the form of {each.name} is another: {unlike}")


def expert_products(model: nn.Module) -> Iterator[ExpertProduct]:
    """The gated products of a model's experts that vLLM quantizes in a kernel of its own."""
    for name, layer in model.named_modules():
        whole = getattr(getattr(getattr(layer, "quant_method", None), "moe_kernel", None), "fused_experts", None)
        owners: tuple[Any, ...] = whole, getattr(whole, "experts", None), getattr(whole, "fallback_experts", None)
        for owner in owners:
            if type(owner).__name__ != EXPERTS or not quantizes_in_blocks(owner.quant_config):
                continue
            if not experts_rule().is_ue8m0:
                return  # vLLM has both in one
            quantize = getattr(sys.modules[type(owner).__module__], QUANTIZE)
            yield ExpertProduct(name, owner, owner.activation, getattr(quantize, "__wrapped__", quantize))


def _take_forms(module: Any) -> None:
    """Have the function of a module of vLLM's that quantizes take a form that was left for it."""
    stock = getattr(module, QUANTIZE)
    if hasattr(stock, "__wrapped__"):
        return

    @wraps(stock)
    def quantize(a: torch.Tensor, a_scale: Any, *args: Any, **named: Any) -> Any:
        output, data, scale = _left.__dict__.pop("form", (None, None, None))
        if output is a and a_scale is None and _is_the_rule(args, named):
            return data, scale
        return stock(a, a_scale, *args, **named)

    setattr(module, QUANTIZE, quantize)


def _is_the_rule(args: tuple[Any, ...], named: dict[str, Any]) -> bool:
    """Whether arguments of vLLM's function are those of RULE, and nothing else is asked for."""
    given = dict(zip(RULE, args, strict=False)) | named
    more = (value for name, value in given.items() if name not in RULE)
    return len(args) <= len(RULE) and all(given.get(name) == value for name, value in RULE.items()) and not any(more)


def _writer(x: torch.Tensor, output: torch.Tensor, spec: str) -> Launcher:
    launch = OPS[PRODUCT].launch(x, None, spec)
    return lambda x, output: launch(x, into=(None, None, output))[:2]


_write = cached("expert_products", _writer)
