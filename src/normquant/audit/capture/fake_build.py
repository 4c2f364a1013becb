"""Runs a user's code that builds a model: where tensors are fake and take no memory, and a GPU need not be there."""

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar
from unittest import mock

import torch
from torch._subclasses import fake_tensor

from normquant.audit.capture.fake_gpu import CreatesOnCpu

T = TypeVar("T")
# Of torch, where code asks a tensor that is fake for what it holds.
_NEEDS_VALUES = (
    "not supported for tensor subclasses",  # numpy() and tolist()
    "Cannot access data pointer",
    "data-dependent expression",
    "WeakValueDictionary",  # of a fake tensor that is pickled
)


@contextlib.contextmanager
def fake_tensors(mode: fake_tensor.FakeTensorMode) -> Iterator[None]:
    """Within: every tensor is fake, and modules that hold fake tensors can be converted and moved. What an operation on
    them raises is not logged as well.
    """
    log = logging.getLogger(fake_tensor.__name__)
    level = log.level
    with contextlib.ExitStack() as stack:
        stack.callback(log.setLevel, level)
        log.setLevel(logging.CRITICAL)
        swap = functools.partial(_swap, torch.utils.swap_tensors)
        stack.enter_context(mock.patch.object(torch.utils, "swap_tensors", swap))
        stack.enter_context(mode)
        yield


def _swap(swap: Callable[[Any, Any], None], one: torch.Tensor, other: torch.Tensor) -> None:
    """torch.utils.swap_tensors, which refuses a fake tensor: the mode that made it has a weak reference to it."""
    if not isinstance(one, fake_tensor.FakeTensor):
        return swap(one, other)
    kinds: tuple[Any, Any] = (type(other), type(one))
    one.__class__, other.__class__ = kinds
    one.__dict__, other.__dict__ = other.__dict__, one.__dict__
    torch._C._swap_tensor_impl(one, other)


def build(make: Callable[[], T]) -> T:
    """What `make` gives where tensors are fake; where it asks for their values, what it gives on the CPU instead.

    Within `fake_tensors`. The second way takes the memory of what is built.
    """
    try:
        return make()
    except Exception as error:
        if not _asks_for_values(error):
            raise
    with fake_tensor.unset_fake_temporarily(), CreatesOnCpu():
        return make()


def _asks_for_values(error: Exception) -> bool:
    kinds = (
        *(fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException),
        *(fake_tensor.UnsupportedFakeTensorException, fake_tensor.UnsupportedOperatorException),
    )
    return isinstance(error, kinds) or any(sign in str(error) for sign in _NEEDS_VALUES)


def as_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments: of a tuple or list, of a mapping by name, or of one value."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def modules_of(fn: Any) -> list[torch.nn.Module]:
    """The modules that a call of `fn` uses: itself, the one that it is a method of, and those that it names."""
    if isinstance(fn, torch.nn.Module):
        return [fn]
    while isinstance(fn, functools.partial):
        fn = fn.func
    found = [getattr(fn, "__self__", None)]
    inner = inspect.unwrap(getattr(fn, "__func__", fn))
    if inspect.isfunction(inner):
        names = inspect.getclosurevars(inner)
        found += [*names.nonlocals.values(), *names.globals.values()]
    return [one for one in found if isinstance(one, torch.nn.Module)]


def like_on_gpu(tensor: torch.Tensor) -> torch.Tensor:
    """A fake tensor on the target's GPU with the shape, strides and dtype of `tensor`. Needs a fake mode."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")


def all_on_gpu(inputs: Any) -> Any:
    """`inputs` with every tensor in it replaced by a fake one on the GPU."""
    return torch.utils._pytree.tree_map_only(torch.Tensor, like_on_gpu, inputs)


@contextlib.contextmanager
def on_gpu(module: torch.nn.Module) -> Iterator[None]:
    """Within: what `module` holds are fake tensors on the GPU; its own are restored afterwards."""
    kept = [(o, dict(o._parameters), dict(o._buffers), _attributes(o)) for o in module.modules()]
    try:
        to_gpu(module)
        yield
    finally:
        for owner, parameters, buffers, attributes in kept:
            owner._parameters.update(parameters)
            owner._buffers.update(buffers)
            owner.__dict__.update(attributes)


def to_gpu(module: torch.nn.Module) -> None:
    """Replace parameters, buffers and tensors that are plain attributes by fake ones on the GPU; shared ones stay
    shared. Needs a fake mode."""
    made: dict[int, Any] = {}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and id(parameter) not in made:
                made[id(parameter)] = torch.nn.Parameter(like_on_gpu(parameter), requires_grad=False)
            owner._parameters[name] = made[id(parameter)] if parameter is not None else None
        for held in (owner._buffers, _attributes(owner)):
            for name, tensor in held.items():
                if tensor is not None and id(tensor) not in made:
                    made[id(tensor)] = like_on_gpu(tensor)
                held[name] = made[id(tensor)] if tensor is not None else None
            if held is not owner._buffers:
                owner.__dict__.update(held)


def _attributes(module: torch.nn.Module) -> dict[str, Any]:
    """Tensors that a module holds beside its parameters and buffers."""
    return {name: value for name, value in vars(module).items() if isinstance(value, torch.Tensor)}
