"""The fused ops with epsilon as a tensor.

`torch.compile(dynamic=True)` turns the Python floats of a module into inputs of the graph, 0-dim float64 tensors on the
CPU. Reading one there waits for no GPU.
"""

from __future__ import annotations

from typing import Any

import torch

from normquant.ops import LIBRARY

OPS = ("rms_norm_quant", "rms_norm_quant_with_norm", "add_rms_norm_quant", "add_rms_norm_quant_with_norm")


def _register(name: str) -> None:
    base = getattr(torch.ops.normquant, name).default
    at = [argument.name for argument in base._schema.arguments].index("eps")

    def fake(*args: Any) -> Any:
        return base(*args[:at], 1.0, *args[at + 1 :])

    def implementation(*args: Any) -> Any:
        return base(*args[:at], float(args[at]), *args[at + 1 :])

    schema = str(base._schema).partition("(")[2].replace("float eps", "Tensor eps")
    LIBRARY.define(f"{name}.tensor({schema}", tags=base.tags)
    LIBRARY.impl(f"{name}.tensor", implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"normquant::{name}.tensor", fake, lib=LIBRARY)


for _name in OPS:
    _register(_name)
