"""A model that torch.compile has had already: what it was compiled with."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

_REGIONS = (
    "{count} of its parts are compiled on their own ({first}, ...), each to code of its own: audit one of them, by a "
    "function that returns (model.{first}, inputs), or build the model without compiling its parts"
)
_OTHER_BACKEND = (
    "it is compiled with another backend than Inductor, whose code cannot be audited: give what was given to "
    "torch.compile"
)
_TWICE = (
    "it is compiled already, and an audit takes the options that it was compiled with: give the options there, or give "
    "what was given to torch.compile"
)


@dataclass(frozen=True)
class Settings:
    """What a model is compiled with: Inductor options by name, and `dynamic` as torch.compile takes it."""

    options: dict[str, Any]
    dynamic: bool | None


def settings(given: Iterable[Any], options: Any, dynamic: bool | None) -> Settings:
    """What to compile with, where `given` may be compiled already, or hold parts that are, and options are asked for.

    Raises ValueError for both at once, for another backend than Inductor, and for parts that are compiled alone.
    """
    compiled = [one for one in given if hasattr(_entry(one), "get_compiler_config")]
    for one in given:
        if isinstance(one, torch.nn.Module):
            _refuse_regions(one)
    if not compiled:
        return Settings(dict(options or {}), dynamic)
    if options:
        raise ValueError(_TWICE)
    own = [_of(_entry(one)) for one in compiled]
    if any(other != own[0] for other in own[1:]):
        raise ValueError(f"{len(own)} of its parts are compiled, with different options: audit one at a time")
    return Settings(own[0].options, own[0].dynamic if dynamic is None else dynamic)


def _entry(one: Any) -> Any:
    """What torch.compile returned: of a module that `module.compile()` has had, what its calls go through."""
    compiled = getattr(one, "_compiled_call_impl", None) if isinstance(one, torch.nn.Module) else None
    return compiled or one


def _of(entry: Any) -> Settings:
    from torch._inductor import config

    whole = entry.get_compiler_config()
    if whole is None:
        raise ValueError(_OTHER_BACKEND)
    now = config.get_config_copy()
    context = getattr(entry, "dynamo_ctx", None) or inspect.getclosurevars(entry).nonlocals.get("self")
    changed = {name: value for name, value in whole.items() if name in now and now[name] != value}
    return Settings(changed, getattr(context, "_dynamic", None))


def _refuse_regions(module: torch.nn.Module) -> None:
    inner = getattr(module, "_orig_mod", module)
    found = [name for name, part in inner.named_modules() if name and _is_compiled(part)]
    if found:
        raise ValueError(_REGIONS.format(count=len(found), first=found[0].removesuffix("._orig_mod")))


def _is_compiled(part: torch.nn.Module) -> bool:
    return part._compiled_call_impl is not None or hasattr(part, "get_compiler_config")
