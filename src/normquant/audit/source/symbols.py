"""The symbolic sizes of a generated module."""

import ast

from normquant.audit.source import sizes
from normquant.audit.source.bindings import is_symbol
from normquant.audit.source.generated_module import Module, Tensor


def symbols(module: Module) -> tuple[str, ...]:
    """The names of the sizes that are not fixed."""
    used: set[str] = set()
    for tensor in module.tensors.values():
        for extent in tensor.size or ():
            used |= sizes.names(extent)
    for call in module.calls:
        for argument in call.arguments:
            if not isinstance(argument, Tensor) and call.kernel is not None:
                used |= sizes.names(argument)
    return tuple(sorted(name for name in used if name in module.hints or is_symbol(name)))


def leads(module: Module, symbol: str) -> int:
    """Of how many tensors a symbol is the leading size."""
    return sum(isinstance(t.size[0], ast.Name) and t.size[0].id == symbol for t in module.tensors.values() if t.size)
