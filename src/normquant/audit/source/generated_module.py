"""A generated module as data: `wrappercode` reads it, `build` makes a program of it. Sizes are expressions."""

import ast
from dataclasses import dataclass, field

Size = tuple[ast.expr, ...]


class NotGenerated(ValueError):
    """Text that is not a module written by Inductor."""


@dataclass(frozen=True)
class Tensor:
    """A name for memory: a buffer, or a view of one."""

    buffer: str
    storage: str
    dtype: str = ""
    size: Size | None = None
    stride: Size | None = None
    is_view: bool = False  # part of a buffer, or another shape of it, as passed to one call


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
    branch: str = ""  # which sides of the branches around it: two launches of different sides never both happen


@dataclass
class Module:
    """One generated module. `kernels` maps names to Triton text, or for CPU kernels to their C++ parameter types."""

    name: str
    kernels: dict[str, str] = field(default_factory=dict)
    cpp_kernels: dict[str, tuple[str, ...]] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    constants: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    hints: dict[str, int] = field(default_factory=dict)  # symbol -> the size that it was compiled with
    notes: list[str] = field(default_factory=list)
    same_as: dict[str, str] = field(default_factory=dict)  # other names of a tensor; memory that is reused has none
    parts: dict[str, list[str]] = field(default_factory=dict)  # a call's several results, under their own names
