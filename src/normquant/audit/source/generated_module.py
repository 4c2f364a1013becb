"""A generated module as data: `wrapper_code` reads it, `evaluate` makes a program of it. Sizes are expressions."""

import ast
import re
from dataclasses import dataclass, field

from normquant.audit import size_expressions
from normquant.audit.program import GeneratedCode

Size = tuple[ast.expr, ...]

_SYMBOL = re.compile(r"^(s|u|f|zf|zuf|ps|ks|ws)\d+$")


class NotGenerated(ValueError):
    """Text that is not a complete module written by Inductor."""


@dataclass(frozen=True)
class Tensor:
    """A name for memory: a buffer, or a view of one."""

    buffer: str
    storage: str
    dtype: str = ""
    size: Size | None = None
    stride: Size | None = None
    is_view: bool = False  # a slice or reshape of a buffer, as passed to one call


@dataclass(frozen=True)
class Call:
    """A launch of a generated kernel (`kernel` is its name in the module), or a call of something else."""

    name: str
    kernel: str | None
    arguments: tuple[Tensor | ast.expr, ...]
    out: tuple[Tensor, ...]  # results, and what is passed as out=
    line: int
    aten: tuple[str, ...] = ()
    origins: tuple[tuple[str, int, str], ...] = ()
    branch: str = ""  # which sides of the branches around it; calls on different sides never both happen


@dataclass
class GeneratedModule:
    """One generated module. `kernels` maps names to Triton text, `cpp_kernels` names to C++ parameter types."""

    code: GeneratedCode
    kernels: dict[str, str] = field(default_factory=dict)
    cpp_kernels: dict[str, tuple[str, ...]] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    constants: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    hints: dict[str, int] = field(default_factory=dict)  # symbol -> the size that it was compiled with
    notes: list[str] = field(default_factory=list)
    same_as: dict[str, str] = field(default_factory=dict)  # alias -> tensor; reused memory is not an alias
    parts: dict[str, list[str]] = field(default_factory=dict)  # a call with several results -> their names

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def symbols(self) -> tuple[str, ...]:
        """The names of the sizes that are not fixed."""
        sizes = [extent for tensor in self.tensors.values() for extent in tensor.size or ()]
        sizes += [a for call in self.calls if call.kernel for a in call.arguments if not isinstance(a, Tensor)]
        used = {name for size in sizes for name in size_expressions.names(size)}
        return tuple(sorted(name for name in used if name in self.hints or is_symbol(name)))

    def count_leading(self, symbol: str) -> int:
        """How many tensors have a symbol as their leading size."""
        leading = (tensor.size[0] for tensor in self.tensors.values() if tensor.size)
        return sum(isinstance(size, ast.Name) and size.id == symbol for size in leading)


def is_symbol(name: str) -> bool:
    """Whether a name is one that Inductor gives to a size."""
    return bool(_SYMBOL.match(name))
