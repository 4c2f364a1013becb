"""What a generated module does not say outright of its tensors: dtypes and sizes, from the places that know them."""

import ast
from collections.abc import Iterable, Mapping
from dataclasses import replace

from normquant.audit.program import Buffer
from normquant.audit.source import kernel_code
from normquant.audit.source.generated_module import Call, Module, Size, Tensor
from normquant.audit.source.kernel_code import KernelCode, NotAKernel
from normquant.audit.source.symbols import symbols


def kernels(module: Module) -> tuple[dict[str, KernelCode], list[str]]:
    """The module's Triton kernels by name, and notes about those that cannot be read."""
    codes: dict[str, KernelCode] = {}
    notes: list[str] = []
    for name in dict.fromkeys(call.kernel for call in module.calls if call.kernel is not None):
        if name in module.kernels:
            try:
                codes[name] = kernel_code.read_kernel(module.kernels[name])
            except NotAKernel as error:
                notes.append(f"kernel {name} could not be read: {error}")
    return codes, notes


def fill_in(module: Module, codes: Mapping[str, KernelCode], compiled: Mapping[str, Buffer]) -> list[str]:
    """Complete `module.tensors`; gives notes about what was assumed. `compiled`: buffers as the compiler knew them."""
    for name, buffer in compiled.items():
        _from_compiler(module, name, buffer)
    notes = _free_leading_sizes(module)
    _from_parameters(module, codes)
    _share_between_names(module)
    for call in module.calls:
        _from_arguments(module, call)
    _share_between_names(module)
    return notes


def pointers(code: KernelCode, call: Call) -> list[tuple[str, Tensor]]:
    """(pointer parameter, the tensor passed for it) of a launch."""
    passed = {i: argument for i, argument in enumerate(call.arguments) if isinstance(argument, Tensor)}
    if len(passed) == len(code.pointers):
        return list(zip(code.pointers, passed.values(), strict=True))
    return [(p, passed[i]) for i, p in enumerate(code.parameters) if p in code.pointers and i in passed]


def parts(module: Module, tensor: Tensor) -> list[Tensor]:
    """The results of a call that has several; else the one."""
    return [module.tensors[name] for name in module.parts.get(tensor.buffer, ())] or [tensor]


def _from_compiler(module: Module, name: str, buffer: Buffer) -> None:
    held = module.tensors.get(name)
    if held is not None and buffer.dtype and buffer.shape:
        size = held.size if held.size is not None else _parsed(buffer.shape)
        stride = held.stride if held.size is not None else _parsed(buffer.stride)
        module.tensors[name] = Tensor(name, held.storage, held.dtype or buffer.dtype, size, stride)


def _free_leading_sizes(module: Module) -> list[str]:
    """Inputs whose size is only known from the benchmark's example follow a symbol that has the same value."""
    owners: dict[int, list[str]] = {}
    for name in symbols(module):
        owners.setdefault(module.hints.get(name, -1), []).append(name)
    notes = []
    for name in module.inputs:
        tensor = module.tensors[name]
        match tensor.size:
            case (ast.Constant(value=int() as extent), *rest) if extent > 1 and len(owners.get(extent, ())) == 1:
                module.tensors[name] = replace(tensor, size=(ast.Name(owners[extent][0]), *rest))
                notes.append(f"inputs with {extent} rows are taken to have {owners[extent][0]} rows")
    return list(dict.fromkeys(notes))


def _from_parameters(module: Module, codes: Mapping[str, KernelCode]) -> None:
    """A tensor without a dtype has that of the kernel parameter that it is passed to."""
    for call in module.calls:
        code = codes.get(call.kernel) if call.kernel else None
        for parameter, tensor in pointers(code, call) if code else ():
            held = module.tensors.get(tensor.buffer)
            if code is not None and held is not None and not held.dtype:
                module.tensors[held.buffer] = replace(held, dtype=code.pointers[parameter])


def _from_arguments(module: Module, call: Call) -> None:
    """The first result of an aten operator has the dtype of its first tensor, where nothing else says."""
    first = next((a for a in call.arguments if isinstance(a, Tensor)), None)
    if call.kernel is not None or not call.out or first is None or not call.name.startswith("aten."):
        return
    held = module.tensors.get(parts(module, call.out[0])[0].buffer)
    if held is not None and not held.dtype:
        source = module.tensors.get(first.buffer, first)
        module.tensors[held.buffer] = replace(held, dtype=source.dtype)


def _share_between_names(module: Module) -> None:
    """What is known of memory under one name holds under its other names, where those say nothing else."""
    known: dict[str, Tensor] = {}
    for tensor in module.tensors.values():
        if tensor.dtype and tensor.size is not None:
            known.setdefault(tensor.storage, tensor)
    for name, tensor in module.tensors.items():
        other = known.get(tensor.storage)
        if other is not None and not tensor.dtype and tensor.size in (None, other.size):
            module.tensors[name] = replace(tensor, dtype=other.dtype, size=other.size, stride=other.stride)


def _parsed(texts: Iterable[str]) -> Size | None:
    try:
        return tuple(ast.parse(text, mode="eval").body for text in texts)
    except SyntaxError:  # a size that the compiler prints in a form of its own
        return None
