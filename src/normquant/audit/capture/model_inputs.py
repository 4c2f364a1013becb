"""What to compile, from the command line: a callable by name with inputs by shape, or a Hugging Face config file."""

import contextlib
import inspect
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from normquant.audit.capture import fake_build
from normquant.audit.capture.fake_gpu import CreatesOnCpu
from normquant.audit.capture.named_objects import is_named, named

_TENSOR = re.compile(r"^(\w+)\[([\d,\s]*)\]$")
_DTYPES = {
    "bf16": torch.bfloat16, "f16": torch.float16, "fp16": torch.float16, "f32": torch.float32, "fp32": torch.float32,
    "f64": torch.float64, "i64": torch.int64, "i32": torch.int32, "i8": torch.int8, "u8": torch.uint8,
    "bool": torch.bool, "fp8": torch.float8_e4m3fn, "f8e4m3": torch.float8_e4m3fn, "f8e5m2": torch.float8_e5m2,
}  # fmt: skip

Compiled = tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]


def named_callable(what: str, arguments: Sequence[str]) -> Compiled:
    """The function to compile, and a function that builds its inputs where tensors are fake.

    With arguments, `what` is the function or module itself, and each argument makes one input. Without, it is called
    without arguments and returns (function or module, inputs); inputs are a tuple, a mapping by name, one tensor, or a
    callable that makes them. The module and its inputs may be made on the CPU or on a GPU that is not there.
    """
    with CreatesOnCpu():  # what a module makes while it is imported
        held = named(what)
    if not callable(held):
        raise ValueError(f"{what}: not a function or module, but {type(held).__name__}")
    if arguments:
        makers = [_maker(argument) for argument in arguments]
        return held, lambda: tuple(make() for make in makers)
    _check_that_it_builds(what, held)
    return _apply, lambda: _on_gpu(*fake_build.build(lambda: _call_of(what, held())))


def _check_that_it_builds(what: str, held: Callable[..., Any]) -> None:
    if isinstance(held, torch.nn.Module):
        raise ValueError(f"{what} is a module: give its inputs, such as --arg bf16[64,7168]")
    try:
        with contextlib.suppress(ValueError):  # a builtin that does not say what it takes
            inspect.signature(held).bind()
    except TypeError as error:
        raise ValueError(
            f"{what}: {error}; give inputs for what is to be compiled, such as --arg bf16[64,7168], or name a function "
            "without arguments that returns (function or module, inputs)"
        ) from None


def _call_of(what: str, made: Any) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """The arguments of `_apply` for what a user's build() returned."""
    if not isinstance(made, tuple) or len(made) != 2 or not callable(made[0]):
        raise ValueError(
            f"{what}() must give (function or module, inputs), and gave {_described(made)}; inputs are a tuple, a "
            "mapping by name, or one tensor"
        )
    function, inputs = made[0], made[1]() if callable(made[1]) else made[1]
    args, kwargs = fake_build.as_arguments(inputs)
    return function, args, kwargs


def _described(made: Any) -> str:
    kinds = ", ".join(type(one).__name__ for one in made) if isinstance(made, (tuple, list)) else ""
    return f"{type(made).__name__} of {kinds}" if kinds else f"{made!r}" if made is None else type(made).__name__


def _on_gpu(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """As `audit` treats a module and inputs that were made on the CPU."""
    for module in (*fake_build.modules_of(function), *(one for one in args if isinstance(one, torch.nn.Module))):
        fake_build.to_gpu(module)
    return function, fake_build.all_on_gpu(args), fake_build.all_on_gpu(kwargs)


def _apply(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return function(*args, **kwargs)


def hugging_face(config_path: str | os.PathLike[str], tokens: int, layers: int | None = None) -> Compiled:
    """(model, token ids [1, tokens] int64) to logits, from a config file alone: no weights are read or downloaded.

    Args:
        config_path: a config.json, or the folder that holds it.
        layers: build only this many layers; all when None.

    Raises:
        ImportError: transformers is not installed.
        ValueError: the file is not a model's config.
    """
    config = _read_config(config_path)
    config.use_cache = False
    if layers is not None:
        config.num_hidden_layers = layers

    def build() -> tuple[Any, ...]:
        from transformers import AutoModelForCausalLM

        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)  # weights are made in it: a fake module cannot be converted afterwards
        try:
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        finally:
            torch.set_default_dtype(dtype)
        fake_build.to_gpu(model)  # transformers makes real tensors on the default device to look at it
        return model, torch.zeros(1, tokens, dtype=torch.int64, device="cuda")

    return _logits, build


def _read_config(path: str | os.PathLike[str]) -> Any:
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise ImportError("auditing a model by its config needs transformers: pip install 'normquant[hf]'") from error
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: not a transformers config file ({reason})") from None


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """What is compiled: token ids [1, tokens] int64 to logits [1, tokens, vocabulary]."""
    return model(input_ids=ids).logits


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
