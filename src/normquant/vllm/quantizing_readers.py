"""What quantizes its input in vLLM outside of a compiled graph: block-FP8 linears, and experts before their products.

Each is one instance with one method that takes the tensor and quantizes it inside. That method is replaced on the
instance: by one that looks whether the quantized form comes with the tensor, and otherwise calls what was there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from normquant import ops
from normquant.ops._tensors import shaped
from normquant.spec import QuantizedActivation, QuantSpec
from normquant.specs import VLLM, VLLM_UE8M0
from normquant.vllm.handover import differing, differing_but_nan
from normquant.vllm.linear_inputs import LinearInput, input_of, kernel_of, product
from normquant.vllm.methods import give_back

PREPARES = ("MoEPrepareAndFinalizeNoDPEPModular", "MoEPrepareAndFinalizeNoDPEPMonolithic")
FEW, MANY = 8, 40  # rows on both sides of the number from which on another kernel computes a linear

Stock = Callable[..., Any]


@dataclass
class Reader(ABC):
    """A reader. name: path of its module in the model. spec: how it quantizes.

    owner, method: the instance and the name of what is replaced; stock: what was there.
    OTHERWISE: what there is to say of a call whose `input` is None.
    """

    OTHERWISE: ClassVar[str]
    name: str
    spec: QuantSpec
    owner: Any = field(repr=False)
    method: str
    stock: Stock = field(repr=False)

    @abstractmethod
    def input(self, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """The tensor that a call quantizes as it is; None for a call that does something else with it."""

    @abstractmethod
    def read(self, form: QuantizedActivation, *args: Any, **kwargs: Any) -> Any:
        """What the call returns, from the form of its input."""

    @abstractmethod
    def unlike(self, *args: Any, **kwargs: Any) -> str:
        """Run the call on first rows of its input as vLLM does and by a form; how they differ, "" if they do not."""

    def replace(self, call: Callable[..., Any]) -> None:
        """Have this called, with the reader as its first argument, in place of vLLM's method."""

        def replaced(*args: Any, **kwargs: Any) -> Any:
            return call(self, *args, **kwargs)

        setattr(self.owner, self.method, replaced)

    def restore(self) -> None:
        """Put vLLM's method back."""
        give_back(self.owner, self.method, self.stock)

    def fresh(self, x: torch.Tensor) -> QuantizedActivation:
        """x [..., K] quantized now, as [M, K]."""
        return ops.group_quant(x.reshape(-1, x.shape[-1]), spec=self.spec)


@dataclass
class LinearReader(Reader):
    """A block-FP8 linear: `kernel.apply_weights(layer, x, bias)`."""

    OTHERWISE: ClassVar[str] = "it is not called with a tensor to be quantized and a bias alone"
    layer: nn.Module = field(repr=False)
    given: LinearInput = field(repr=False)

    def input(self, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        plain = len(args) in (2, 3) and args[0] is self.layer and kwargs.keys() <= {"bias"}
        return args[1] if plain and isinstance(args[1], torch.Tensor) else None

    def read(self, form: QuantizedActivation, *args: Any, **kwargs: Any) -> Any:
        layer, x, bias = (*args, *kwargs.values(), None)[:3]
        out = product(layer, self.owner, self.given, form, bias)
        return shaped(out, x)

    def unlike(self, *args: Any, **kwargs: Any) -> str:
        layer, x, *bias = *args, *kwargs.values()
        x = x.reshape(-1, x.shape[-1])
        for count in (FEW, MANY):
            few = x[:count]
            expected = self.stock(layer, few, *bias)
            given = self.read(self.fresh(few), layer, few, *bias)
            if n := differing(given, expected):
                return f"its product on {len(few)} quantized rows is another: {n:,} of {expected.numel():,} differ"
        return ""


@dataclass
class ExpertsReader(Reader):
    """Routed experts: `prepare(x, ..., quant_config, defer_input_quant)` gives x quantized and its scales first."""

    OTHERWISE: ClassVar[str] = "they weight their input, or quantize it later or by another rule"

    def input(self, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        at = 6 if self.is_modular else 2  # of quant_config among the arguments
        named = dict(zip(("quant_config", "defer_input_quant"), args[at:], strict=False)) | kwargs
        weighted = args[5] if self.is_modular and len(args) > 5 else kwargs.get("apply_router_weight_on_input", False)
        if weighted or named.get("defer_input_quant", False) or not quantizes_in_blocks(named.get("quant_config")):
            return None
        return args[0] if args else kwargs.get("a1")

    def read(self, form: QuantizedActivation, *args: Any, **kwargs: Any) -> Any:
        if self.is_modular:
            return form.data, form.scale, None, None, None
        return form.data, form.scale, args[1] if len(args) > 1 else kwargs["router_logits"]

    def unlike(self, *args: Any, **kwargs: Any) -> str:
        x = self.input(*args, **kwargs)
        assert x is not None
        expected, form = self.stock(*args, **kwargs), self.fresh(x)
        for part, given, other in zip(("values", "scales"), (form.data, form.scale), expected, strict=False):
            ours, theirs = ((tuple(t.shape), t.stride()) for t in (given, other))
            if ours != theirs:
                return f"its {part} have shape and stride {theirs}, not {ours}"
            if n := differing_but_nan(given, other):
                return f"{n:,} of {other.numel():,} {part} differ"
        return ""

    @property
    def is_modular(self) -> bool:
        return type(self.owner).__name__ == PREPARES[0]


@dataclass(frozen=True)
class Unreadable:
    """A reader that stays vLLM's. name: of its module."""

    name: str
    reason: str


def linears(model: nn.Module) -> Iterator[LinearReader | Unreadable]:
    """The block-FP8 linears of a model."""
    for name, layer in model.named_modules():
        kernel = kernel_of(layer)
        if kernel is None:
            continue
        try:
            given = input_of(layer, kernel)
        except ValueError as reason:
            yield Unreadable(name, str(reason))
            continue
        yield LinearReader(name, given.spec, kernel, "apply_weights", kernel.apply_weights, layer, given)


def experts(model: nn.Module) -> Iterator[ExpertsReader | Unreadable]:
    """The block-FP8 experts of a model."""
    for name, layer in model.named_modules():
        kernel: Any = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
        prepare = getattr(kernel, "prepare_finalize", None)
        config = getattr(getattr(kernel, "fused_experts", None), "quant_config", None)
        if prepare is None or not quantizes_in_blocks(config):
            continue
        if type(prepare).__name__ not in PREPARES:
            yield Unreadable(name, f"{type(prepare).__name__} quantizes for experts on other GPUs")
        elif kernel.fused_experts.expects_unquantized_inputs:
            yield Unreadable(name, f"{type(kernel.fused_experts).__name__} takes bf16 and quantizes inside")
        else:
            yield ExpertsReader(name, experts_rule(), prepare, "prepare", prepare.prepare)


def quantizes_in_blocks(config: Any) -> bool:
    """Whether a FusedMoEQuantConfig says 1x128 FP8 of the input with scales of its own."""
    if config is None or getattr(config, "quant_dtype", None) != torch.float8_e4m3fn:
        return False
    return list(config.block_shape or ()) == [128, 128] and config.a1_scale is None and not config.per_act_token_quant


def experts_rule() -> QuantSpec:
    """How `moe_kernel_quantize_input` quantizes: with powers of two where DeepGEMM is used with them."""
    from vllm.utils.deep_gemm import is_deep_gemm_e8m0_used

    return VLLM_UE8M0 if is_deep_gemm_e8m0_used() else VLLM
