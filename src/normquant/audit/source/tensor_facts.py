"""Dtypes and sizes that a generated module does not state for its tensors, from where they can be inferred."""

import ast
from collections.abc import Iterable, Mapping
from dataclasses import replace

from normquant.audit import size_expressions
from normquant.audit.program import Buffer
from normquant.audit.source import kernel_code
from normquant.audit.source.generated_module import Call, GeneratedModule, Size, Tensor
from normquant.audit.source.kernel_code import KernelCode, NotAKernel


def kernels(module: GeneratedModule) -> dict[str, KernelCode]:
    """The module's Triton kernels by name; one that cannot be read is noted."""
    codes: dict[str, KernelCode] = {}
    for name in dict.fromkeys(call.kernel for call in module.calls if call.kernel is not None):
        if name in module.kernels:
            try:
                codes[name] = kernel_code.read_kernel(module.kernels[name])
            except NotAKernel as error:
                module.note(f"kernel {name} could not be read: {error}")
    return codes


def fill_in(module: GeneratedModule, codes: Mapping[str, KernelCode], compiled: Mapping[str, Buffer]) -> None:
    """Complete `module.tensors`, noting what is assumed. `compiled` are buffers as the compiler knew them."""
    for name, buffer in compiled.items():
        _from_compiler(module, name, buffer)
    _free_leading_sizes(module)
    _from_parameters(module, codes)
    _share_between_names(module)
    for call in module.calls:
        _from_arguments(module, call)
    _share_between_names(module)


def pointers(code: KernelCode, call: Call) -> list[tuple[str, Tensor]]:
    """(pointer parameter, the tensor passed for it) of a call."""
    passed = {i: argument for i, argument in enumerate(call.arguments) if isinstance(argument, Tensor)}
    if len(passed) == len(code.pointers):
        return list(zip(code.pointers, passed.values(), strict=True))
    return [(p, passed[i]) for i, p in enumerate(code.parameters) if p in code.pointers and i in passed]


def parts(module: GeneratedModule, tensor: Tensor) -> list[Tensor]:
    """The tensors that a call's result consists of: itself, unless it is a tuple."""
    return [module.tensors[name] for name in module.parts.get(tensor.buffer, ())] or [tensor]


def _from_compiler(module: GeneratedModule, name: str, buffer: Buffer) -> None:
    held = module.tensors.get(name)
    if held is not None and buffer.dtype and buffer.shape:
        size = held.size if held.size is not None else _parsed(buffer.shape)
        stride = held.stride if held.size is not None else _parsed(buffer.stride)
        module.tensors[name] = Tensor(name, held.storage, held.dtype or buffer.dtype, size, stride)


def _free_leading_sizes(module: GeneratedModule) -> None:
    """Inputs whose size is only known from the benchmark's example follow the symbol with the same value."""
    owners: dict[int, list[str]] = {}
    for name in module.symbols():
        owners.setdefault(module.hints.get(name, -1), []).append(name)
    for name in module.inputs:
        tensor = module.tensors[name]
        match tensor.size:
            case (ast.Constant(value=int() as extent), *rest) if extent > 1 and len(owners.get(extent, ())) == 1:
                module.tensors[name] = replace(tensor, size=(ast.Name(owners[extent][0]), *rest))
                module.note(f"inputs with {extent} rows are taken to have {owners[extent][0]} rows")


def _from_parameters(module: GeneratedModule, codes: Mapping[str, KernelCode]) -> None:
    """A tensor without a dtype has that of the kernel parameter that it is passed for."""
    for call in module.calls:
        code = codes.get(call.kernel) if call.kernel else None
        for parameter, tensor in pointers(code, call) if code else ():
            held = module.tensors.get(tensor.buffer)
            if code is not None and held is not None and not held.dtype:
                module.tensors[held.buffer] = replace(held, dtype=code.pointers[parameter])


def _from_arguments(module: GeneratedModule, call: Call) -> None:
    """The first result of an aten operator has the dtype of its first tensor, where nothing else is known."""
    first = next((a for a in call.arguments if isinstance(a, Tensor)), None)
    if call.kernel is not None or not call.out or first is None or not call.name.startswith("aten."):
        return
    held = module.tensors.get(parts(module, call.out[0])[0].buffer)
    if held is not None and not held.dtype:
        source = module.tensors.get(first.buffer, first)
        module.tensors[held.buffer] = replace(held, dtype=source.dtype)


def _share_between_names(module: GeneratedModule) -> None:
    """What is known of memory under one name holds for its aliases, unless they have a size of their own."""
    known: dict[str, Tensor] = {}
    for tensor in module.tensors.values():
        if tensor.dtype and tensor.size is not None:
            known.setdefault(tensor.storage, tensor)
    for name, tensor in module.tensors.items():
        other = known.get(tensor.storage)
        if other is not None and not tensor.dtype and tensor.size in (None, other.size):
            module.tensors[name] = replace(tensor, dtype=other.dtype, size=other.size, stride=other.stride)


def _parsed(texts: Iterable[str]) -> Size | None:
    sizes = [size_expressions.parse(text) for text in texts]
    known = tuple(size for size in sizes if size is not None)
    return known if len(known) == len(sizes) else None  # the compiler prints some sizes in a syntax of its own
