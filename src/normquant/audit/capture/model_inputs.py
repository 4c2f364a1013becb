"""What to compile, from the command line: a callable by its name, and its inputs by their form."""

import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from normquant.audit.capture import hugging_face as hf
from normquant.audit.capture.live_compile import like_on_gpu, to_gpu

_NAMED = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")
_TENSOR = re.compile(r"^(\w+)\[([\d,\s]*)\]$")
_DTYPES = {
    "bf16": torch.bfloat16, "f16": torch.float16, "fp16": torch.float16, "f32": torch.float32, "fp32": torch.float32,
    "f64": torch.float64, "i64": torch.int64, "i32": torch.int32, "i8": torch.int8, "u8": torch.uint8,
    "bool": torch.bool, "fp8": torch.float8_e4m3fn, "f8e4m3": torch.float8_e4m3fn, "f8e5m2": torch.float8_e5m2,
}  # fmt: skip

Compiled = tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]


def is_named(what: str) -> bool:
    """Whether `what` has the form module:callable."""
    return bool(_NAMED.match(what))


def named(what: str) -> Any:
    """The object at module:callable; modules of the working directory are found, too."""
    module_name, _, attribute = what.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    held: Any = importlib.import_module(module_name)
    for part in attribute.split("."):
        if not hasattr(held, part):
            raise ValueError(f"{what}: {held.__name__ if hasattr(held, '__name__') else module_name} has no {part!r}")
        held = getattr(held, part)
    return held


def compiled(what: str, arguments: Sequence[str]) -> Compiled:
    """The function to compile and the builder of its inputs.

    With arguments, `what` is the function or module itself and every argument makes one input. Without, it is called
    with nothing, where tensors are fake, and gives (function or module, inputs); inputs may be a callable that makes
    them. A module and its inputs may be made on the CPU.
    """
    held = named(what)
    if not callable(held):
        raise ValueError(f"{what}: not a callable, but {type(held).__name__}")
    if arguments:
        makers = [_maker(argument) for argument in arguments]
        return held, lambda: tuple(make() for make in makers)

    def build() -> tuple[Any, ...]:
        made = held()
        if not isinstance(made, tuple) or len(made) != 2 or not callable(made[0]):
            raise ValueError(f"{what}() must give (function or module, inputs), or inputs must be given with --arg")
        inputs = made[1]() if callable(made[1]) else made[1]
        inputs = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
        if isinstance(made[0], torch.nn.Module):  # as `audit` does with a module made on the CPU
            to_gpu(made[0])
            inputs = torch.utils._pytree.tree_map_only(torch.Tensor, like_on_gpu, tuple(inputs))
        return (made[0], *inputs)

    return _apply, build


def _apply(function: Callable[..., Any], *inputs: Any) -> Any:
    return function(*inputs)


def hugging_face(config: str, tokens: int, layers: int | None) -> Compiled:
    """The model of a config file, to compile for one sequence."""
    return hf.logits, hf.builder(config, tokens, layers)


def _maker(argument: str) -> Callable[[], Any]:
    """`bf16[64,7168]` is a tensor, `3` and `0.5` are numbers, and module:callable is called to make an input."""
    found = _TENSOR.match(argument)
    if found and found.group(1) in _DTYPES:
        sizes = [int(extent) for extent in found.group(2).split(",") if extent.strip()]
        dtype = _DTYPES[found.group(1)]
        return lambda: torch.empty(sizes, dtype=dtype, device="cuda")
    if is_named(argument):
        return lambda: named(argument)()
    for number in (int, float):
        try:
            value = number(argument)
        except ValueError:
            continue
        return lambda: value
    raise ValueError(
        f"--arg {argument!r}: give a tensor as dtype[sizes] with dtype one of {', '.join(_DTYPES)}, "
        "a number, or module:callable"
    )
