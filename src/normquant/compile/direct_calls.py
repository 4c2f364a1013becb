"""Calls of an op's launcher in generated code, without torch's dispatcher in between.

Inductor writes `torch.ops.normquant.X.default(...)`, which parses the arguments by the schema and asks the dispatcher
for the implementation: a quarter of the time that a launch takes the CPU. In a graph compiled for CUDA the answer is
always the same, so the call goes to `.default.launch(...)`, which is that implementation (`ops/_op.py`). Where
Inductor's own classes are other than expected, it is the usual call that is written.
"""

from __future__ import annotations

from functools import cache, wraps
from typing import Any

import torch
from torch._inductor import lowering
from torch._inductor.virtualized import V

from normquant.ops._op import DIRECT


def register() -> None:
    """Have Inductor write such calls for the ops of this package, in every graph that it compiles from here on."""
    for overload in DIRECT:
        _lower(overload)


@cache
def _lower(overload: torch._ops.OpOverload) -> None:
    if overload not in lowering.lowerings:
        # As Inductor does for an op that it does not know, with the constraint that the op's tag asks for.
        lowering.make_fallback(overload, layout_constraint=lowering.constrain_to_fx_strides, warn=False)
    fallback = lowering.lowerings[overload]

    @wraps(fallback)
    def lower(*args: Any, **kwargs: Any) -> Any:
        before = len(V.graph.operations)
        outputs = fallback(*args, **kwargs)
        for operation in V.graph.operations[before:]:
            _call_launcher(operation, overload)
        return outputs

    lowering.lowerings[overload] = lower


def _call_launcher(operation: Any, overload: torch._ops.OpOverload) -> None:
    expected = f"torch.ops.{overload!s}"
    python = not V.graph.cpp_wrapper and not V.graph.aot_mode
    if python and getattr(operation, "python_kernel_name", None) == expected and _on_cuda(operation):
        operation.python_kernel_name = f"{expected}.launch"


def _on_cuda(operation: Any) -> bool:
    device = operation.get_device()
    return device is not None and device.type == "cuda"
