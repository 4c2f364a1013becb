"""vLLM's operations that hold a layer of experts, `vllm::moe_forward` and `vllm::moe_forward_shared`, with a quantized
form of their input beside it.

    normquant_vllm::moe_forward(hidden_states, data, scale, spec, <the others of vllm::moe_forward>)

In a compiled graph the form is a value like any other, so that the compiler keeps it for as long as it is read, and
nothing can write to the hidden states in between. Inside, it is left with a tensor over the same memory, which is what
vLLM's operation gets; the quantizations of experts and shared experts take it from there (`compiled_experts`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from normquant.spec import QuantizedActivation, QuantSpec
from normquant.vllm.fp8_linear import LIBRARY
from normquant.vllm.handover import carrying, drop, leave

NAMES = ("moe_forward", "moe_forward_shared")
FIRST, ADDED = " hidden_states, ", "Tensor data, Tensor scale, str spec, "
LAYER_NAME = "vllm.utils.torch_utils.LayerName"  # how a schema spells it, which prints it as PyObject
_defined: set[str] = set()


def define_ops() -> None:
    """Define an operation for each that vLLM has. Raises RuntimeError where one's schema is another than is known."""
    for name in NAMES:
        stock = getattr(getattr(torch.ops.vllm, name, None), "default", None)
        if stock is None or name in _defined:
            continue
        arguments = str(stock._schema).partition("(")[2].replace("PyObject", LAYER_NAME)
        if arguments.count(FIRST) != 1 or not arguments.startswith("Tensor"):
            raise RuntimeError(f"vllm::{name} has the schema {stock._schema}, which does not begin with hidden_states")
        schema = f"{name}({arguments.replace(FIRST, FIRST + ADDED)}"
        LIBRARY.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
        LIBRARY.impl(name, partial(_run, stock), "CompositeExplicitAutograd")
        torch.library.register_fake(f"normquant_vllm::{name}", partial(_fake, stock), lib=LIBRARY)
        _defined.add(name)


def _run(stock: Any, x: torch.Tensor, data: torch.Tensor, scale: torch.Tensor, spec: str, *others: Any) -> Any:
    with carrying():
        carrier = torch.empty(0, dtype=x.dtype, device=x.device)
        carrier.set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())
    leave(carrier, QuantizedActivation(data, scale, QuantSpec.decode(spec)))
    try:  # vLLM gives the hidden states to the shared experts as another argument
        return stock(carrier, *(carrier if each is x else each for each in others))
    finally:
        drop(carrier)


def _fake(stock: Any, x: torch.Tensor, data: Any, scale: Any, spec: str, *others: Any) -> Any:
    return stock(x, *others)
