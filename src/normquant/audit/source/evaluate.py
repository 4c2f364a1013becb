"""A generated module at one set of sizes: a `Program`."""

import ast
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from normquant.audit.program import (
    COPY_LAYOUT,
    COPY_SAME,
    DTYPE_BYTES,
    Access,
    Buffer,
    Copy,
    Extern,
    Kernel,
    Launch,
    Origin,
    Program,
    View,
)
from normquant.audit.source import index_reach, kernel_code, moved_stores, operators, sizes, tensor_facts
from normquant.audit.source.generated_module import Call, Module, Size, Tensor
from normquant.audit.source.kernel_code import KernelCode
from normquant.audit.source.kernel_values import Site, Uses
from normquant.audit.source.symbols import symbols


def build(
    module: Module, given: Mapping[str, int] | None = None, compiled: Mapping[str, Buffer] | None = None
) -> Program:
    """The program of `module`; `given` sets sizes, the others are those that it was compiled with.

    `compiled` is what the compiler knew of its buffers: for tensors whose size or dtype the code does not show.
    """
    module = replace(module, tensors=dict(module.tensors))  # what is learned below holds for these sizes
    codes, notes = tensor_facts.kernels(module)
    notes = [*module.notes, *notes, *tensor_facts.fill_in(module, codes, compiled or {})]
    return _Builder(module, {**module.hints, **(given or {})}, codes, notes).program()


@dataclass
class _Builder:
    module: Module
    values: dict[str, int]
    codes: dict[str, KernelCode]
    notes: list[str]
    written: set[str] = field(default_factory=set)
    uses: dict[tuple[str, tuple[tuple[str, int], ...]], Uses | None] = field(default_factory=dict)

    def program(self) -> Program:
        self.written = {*self.module.inputs, *self.module.constants}
        launches = tuple(self.launch(position, call) for position, call in enumerate(self.module.calls))
        buffers = {name: self.buffer(tensor) for name, tensor in self.module.tensors.items()}
        known = {name: self.values[name] for name in symbols(self.module) if name in self.values}
        return Program(launches, buffers, tuple(self.module.outputs), known, self.module.name, tuple(self.notes))

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def launch(self, position: int, call: Call) -> Launch:
        if call.kernel is None:
            return self.extern(position, call)
        return self.kernel(position, call)

    # ---- sizes

    def number(self, node: ast.expr) -> int | None:
        try:
            return sizes.evaluate(node, self.values)
        except sizes.UnknownSize:
            return None

    def numel(self, tensor: Tensor) -> int | None:
        """Different elements of a tensor: a dimension of stride 0 repeats the same ones."""
        if tensor.size is None:
            return None
        strides = [self.number(step) for step in tensor.stride or ()] or [None] * len(tensor.size)
        extents = [self.number(e) for e, step in zip(tensor.size, strides, strict=False) if step != 0]
        known = [extent for extent in extents if extent is not None and extent >= 0]
        return math.prod(known) if len(known) == len(extents) else None

    def tensor(self, tensor: Tensor) -> Tensor:
        """The tensor with what was learned of its buffer."""
        held = self.module.tensors.get(tensor.buffer, tensor)
        return replace(tensor, dtype=tensor.dtype or held.dtype) if tensor.is_view else held

    def is_written(self, name: str) -> bool:
        """Whether a tensor, or one that it is another name of, holds something by now."""
        for _ in range(len(self.module.same_as) + 1):
            if name in self.written:
                return True
            if name not in self.module.same_as:
                return False
            name = self.module.same_as[name]
        return False

    def bytes_of(self, tensor: Tensor) -> int:
        tensor = self.tensor(tensor)
        count, width = self.numel(tensor), DTYPE_BYTES.get(tensor.dtype)
        if count is None or width is None:
            self.note(f"the size of {tensor.buffer} is not in the code: its bytes are not counted")
            return 0
        return count * width

    def buffer(self, tensor: Tensor) -> Buffer:
        role = "intermediate"
        if tensor.buffer in self.module.inputs:
            role = "input"
        elif tensor.buffer in self.module.constants:
            role = "constant"
        elif tensor.buffer in self.module.outputs:
            role = "output"
        tensor = self.tensor(tensor)
        count = self.numel(tensor) or 0
        return Buffer(
            tensor.buffer,
            tensor.dtype,
            _texts(tensor.size),
            _texts(tensor.stride),
            count * DTYPE_BYTES.get(tensor.dtype, 0),
            role,
            tensor.storage,
        )

    # ---- generated kernels

    def kernel(self, position: int, call: Call) -> Kernel:
        assert call.kernel is not None
        code = self.codes.get(call.kernel)
        if code is None:
            return self.unread(position, call)
        pointers = tensor_facts.pointers(code, call)
        uses = self.read_uses(code, call)
        reads, writes = self.accesses(code, pointers, uses)
        moved = self.copies(code, pointers, uses)
        self.written |= {access.buffer for access in writes}
        return Kernel(
            position, call.name, tuple(reads), tuple(writes), self.module.name, call.line, _origins(call), call.aten,
            kind=code.kind,
            branch=call.branch,
            rows=self.rows(reads, writes),
            copies=moved,
            is_copy=bool(moved) and uses is not None and len(moved) == len(uses.stores),
        )  # fmt: skip

    def unread(self, position: int, call: Call) -> Kernel:
        """A kernel whose text is not there or not Triton: whole buffers, direction by its C++ types or by first use."""
        tensors = [argument for argument in call.arguments if isinstance(argument, Tensor)]
        types = self.module.cpp_kernels.get(call.name, ())
        reads: list[Access] = []
        writes: list[Access] = []
        for index, tensor in enumerate(tensors):
            constant = types[index].startswith("const") if index < len(types) else self.is_written(tensor.buffer)
            (reads if constant else writes).append(Access(tensor.buffer, self.bytes_of(tensor)))
        self.written |= {access.buffer for access in writes}
        kind = "cpp" if types else "unread"
        return Kernel(
            position, call.name, tuple(reads), tuple(writes), self.module.name, call.line, _origins(call), call.aten,
            kind=kind, rows=self.rows(reads, writes), branch=call.branch,
        )  # fmt: skip

    def read_uses(self, code: KernelCode, call: Call) -> Uses | None:
        numbers = {}
        for parameter, argument in zip(code.parameters, call.arguments, strict=False):
            if parameter not in code.pointers and not isinstance(argument, Tensor):
                value = self.number(argument)
                if value is not None:
                    numbers[parameter] = value
        key = (call.name, tuple(sorted(numbers.items())))
        if key not in self.uses:
            try:
                self.uses[key] = kernel_code.read_uses(code, numbers)
            except (sizes.UnknownSize, RecursionError) as error:
                self.note(f"kernel {call.name}: {error or 'too deeply nested'} is not known; whole buffers are counted")
                self.uses[key] = None
        return self.uses[key]

    def accesses(
        self, code: KernelCode, pointers: list[tuple[str, Tensor]], uses: Uses | None
    ) -> tuple[list[Access], list[Access]]:
        reads, writes = [], []
        for parameter, tensor in pointers:
            loads = [site for site in uses.loads if site.pointer == parameter] if uses else []
            stores = [stored.site for stored in uses.stores if stored.site.pointer == parameter] if uses else []
            atomics = [s.site for s in uses.stores if s.site.pointer == parameter and s.atomic] if uses else []
            if loads or atomics:
                reads.append(self.access(code, parameter, tensor, [*loads, *atomics]))
            if stores:
                writes.append(self.access(code, parameter, tensor, stores))
            if not loads and not stores:  # it is used in a way that is not followed
                used = writes if parameter in code.mutated or "out" in parameter else reads
                used.append(Access(tensor.buffer, self.bytes_of(tensor)))
        return reads, writes

    def access(self, code: KernelCode, parameter: str, tensor: Tensor, sites: list[Site]) -> Access:
        width = DTYPE_BYTES.get(code.pointers[parameter], 0)
        whole = self.numel(self.tensor(tensor))
        passes = _passes(sites)
        if not code.generated or any(not s.index.digits and s.index.linear is None for s in sites):
            return Access(tensor.buffer, self.bytes_of(tensor), passes)
        reached = {site.key: index_reach.distinct(site.index.digits, site.bounds) for site in sites}
        count = sum(reached.values())
        held = self.module.tensors.get(tensor.buffer)
        limit = max((n for n in (whole, self.numel(held) if held else None) if n is not None), default=None)
        return Access(tensor.buffer, (count if limit is None else min(count, limit)) * width, passes)

    def copies(self, code: KernelCode, pointers: list[tuple[str, Tensor]], uses: Uses | None) -> tuple[Copy, ...]:
        if uses is None or not code.generated:
            return ()
        names = {parameter: tensor.buffer for parameter, tensor in pointers}
        return tuple(
            Copy(names[load], names[store], COPY_SAME if same else COPY_LAYOUT, dtypes)
            for load, store, same, dtypes in moved_stores.plain_copies(code, uses)
            if load in names and store in names
        )

    def rows(self, reads: Iterable[Access], writes: Iterable[Access]) -> str:
        """The leading size of the largest tensor written, else read: launches over the same rows have the same."""
        return self.leading_size(writes) or self.leading_size(reads)

    def leading_size(self, accesses: Iterable[Access]) -> str:
        largest, text = -1, ""
        for tensor in (self.module.tensors[a.buffer] for a in accesses if a.buffer in self.module.tensors):
            count = self.numel(tensor)
            if tensor.size and len(tensor.size) > 1 and count is not None and count > largest:
                largest, text = count, next((t for t in _texts(tensor.size) if t != "1"), "1")
        return text

    # ---- calls of what was not generated

    def extern(self, position: int, call: Call) -> Extern:
        known = operators.operator(call.name)
        reads: list[Access] = []
        results = [part for tensor in call.out for part in tensor_facts.parts(self.module, tensor)]
        writes = [Access(tensor.buffer, self.bytes_of(tensor)) for tensor in results]
        mutates: list[str] = []
        for index, argument in enumerate(call.arguments):
            if not isinstance(argument, Tensor):
                continue
            access = Access(argument.buffer, self.bytes_of(argument))
            fresh = not self.is_written(argument.buffer)
            if index in known.mutates or (fresh and not operators.is_known(call.name)):
                writes.append(access)
                if not fresh:
                    mutates.append(argument.buffer)
            if not fresh:
                reads.append(access)
        self.written |= {access.buffer for access in writes}
        return Extern(
            position, call.name, tuple(reads), tuple(writes), self.module.name, call.line, _origins(call), call.aten,
            tuple(mutates), call.branch, arguments=tuple(_argument_text(argument) for argument in call.arguments),
            views={i: self.as_passed(a) for i, a in enumerate(call.arguments) if isinstance(a, Tensor)},
        )  # fmt: skip

    def as_passed(self, tensor: Tensor) -> View:
        tensor = self.tensor(tensor)
        return View(tensor.buffer, _texts(tensor.size), _texts(tensor.stride))


def _passes(sites: Iterable[Site]) -> int:
    """How many passes over the data load the same elements."""
    sections: dict[tuple[object, ...], set[int]] = {}
    for site in sites:
        sections.setdefault(site.key, set()).add(site.section)
    return max((len(found) for found in sections.values()), default=1)


def _origins(call: Call) -> tuple[Origin, ...]:
    return tuple(Origin(file, line, code) for file, line, code in call.origins)


def _texts(size: Size | None) -> tuple[str, ...]:
    return tuple(ast.unparse(extent) for extent in size or ())


def _argument_text(argument: Tensor | ast.expr) -> str:
    if isinstance(argument, Tensor):
        return argument.buffer
    text = ast.unparse(argument)
    return text if len(text) <= 80 else text[:77] + "..."
