"""A generated module at one set of sizes: a `Program`."""

import ast
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from normquant.audit import digits, kernelcode, opaque, sizes
from normquant.audit.kernelcode import KernelCode, NotAKernel
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
)
from normquant.audit.values import Site, Uses
from normquant.audit.wrappercode import Call, Module, Size, Tensor


def build(module: Module, given: Mapping[str, int] | None = None) -> Program:
    """The program of `module`; `given` sets sizes, the others are those that it was compiled with."""
    return _Builder(module, {**module.hints, **(given or {})}).program()


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
    return tuple(sorted(name for name in used if name in module.hints or name[:1] in "su" and name[1:].isdigit()))


@dataclass
class _Builder:
    module: Module
    values: dict[str, int]
    notes: list[str] = field(default_factory=list)
    written: set[str] = field(default_factory=set)
    codes: dict[str, KernelCode | None] = field(default_factory=dict)
    uses: dict[tuple[str, tuple[tuple[str, int], ...]], Uses | None] = field(default_factory=dict)

    def program(self) -> Program:
        self.notes = list(self.module.notes)
        self.free_leading_sizes()
        self.infer_dtypes()
        self.written = {*self.module.inputs, *self.module.constants}
        launches = tuple(self.launch(position, call) for position, call in enumerate(self.module.calls))
        buffers = {name: self.buffer(tensor) for name, tensor in self.module.tensors.items()}
        return Program(
            launches, buffers, tuple(self.module.outputs), dict(self.values), self.module.name, tuple(self.notes)
        )

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def free_leading_sizes(self) -> None:
        """Inputs whose size is only known from the benchmark's example follow a symbol that has the same value."""
        owners: dict[int, list[str]] = {}
        for name in symbols(self.module):
            owners.setdefault(self.module.hints.get(name, -1), []).append(name)
        for name in self.module.inputs:
            tensor = self.module.tensors[name]
            match tensor.size:
                case (ast.Constant(value=int() as extent), *rest) if extent > 1 and len(owners.get(extent, ())) == 1:
                    size = (ast.Name(owners[extent][0]), *rest)
                    self.module.tensors[name] = Tensor(name, tensor.storage, tensor.dtype, size, tensor.stride)
                    self.note(f"inputs with {extent} rows are taken to have {owners[extent][0]} rows")

    def infer_dtypes(self) -> None:
        """A tensor that the module gives no dtype has that of the kernel parameter that it is passed to."""
        for call in self.module.calls:
            code = self.code(call.kernel) if call.kernel else None
            for parameter, tensor in self.pointers(code, call) if code else ():
                held = self.module.tensors.get(tensor.buffer)
                if held is not None and not held.dtype:
                    dtype = code.pointers[parameter] if code else ""
                    self.module.tensors[held.buffer] = Tensor(held.buffer, held.storage, dtype, held.size, held.stride)

    def code(self, name: str) -> KernelCode | None:
        if name not in self.codes:
            self.codes[name] = None
            source = self.module.kernels.get(name)
            if source is not None:
                try:
                    self.codes[name] = kernelcode.read_kernel(source)
                except NotAKernel as error:
                    self.note(f"kernel {name} could not be read: {error}")
        return self.codes[name]

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

    def numel(self, size: Size | None) -> int | None:
        extents = [self.number(extent) for extent in size] if size is not None else [None]
        known = [extent for extent in extents if extent is not None]
        return math.prod(known) if len(known) == len(extents) else None

    def tensor(self, tensor: Tensor) -> Tensor:
        """The tensor with what was learned of its buffer."""
        held = self.module.tensors.get(tensor.buffer, tensor)
        if tensor.size is None and held.size is not None:
            return held
        return Tensor(tensor.buffer, tensor.storage, tensor.dtype or held.dtype, tensor.size, tensor.stride)

    def bytes_of(self, tensor: Tensor) -> int:
        tensor = self.tensor(tensor)
        count, width = self.numel(tensor.size), DTYPE_BYTES.get(tensor.dtype)
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
        count = self.numel(tensor.size) or 0
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

    def pointers(self, code: KernelCode, call: Call) -> list[tuple[str, Tensor]]:
        """(pointer parameter, the tensor passed for it)."""
        passed = [(i, argument) for i, argument in enumerate(call.arguments) if isinstance(argument, Tensor)]
        if len(passed) == len(code.pointers):
            return list(zip(code.pointers, (tensor for _, tensor in passed), strict=True))
        by_position = {i: tensor for i, tensor in passed}
        return [(p, by_position[i]) for i, p in enumerate(code.parameters) if p in code.pointers and i in by_position]

    def kernel(self, position: int, call: Call) -> Kernel:
        assert call.kernel is not None
        code = self.code(call.kernel)
        if code is None:
            return self.unread(position, call)
        pointers = self.pointers(code, call)
        uses = self.read_uses(code, call)
        reads, writes = self.accesses(code, pointers, uses)
        copies = self.copies(code, pointers, uses)
        self.written |= {access.buffer for access in writes}
        return Kernel(
            position, call.name, tuple(reads), tuple(writes), self.module.name, call.line, _origins(call), call.aten,
            kind=code.kind,
            rows=self.rows(tensor for _, tensor in pointers),
            copies=copies,
            is_copy=bool(copies) and uses is not None and len(copies) == len(uses.stores),
        )  # fmt: skip

    def unread(self, position: int, call: Call) -> Kernel:
        """A kernel whose text is not there or not Triton: whole buffers, direction by its C++ types or by first use."""
        tensors = [argument for argument in call.arguments if isinstance(argument, Tensor)]
        types = self.module.cpp_kernels.get(call.name, ())
        reads, writes = [], []
        for index, tensor in enumerate(tensors):
            constant = types[index].startswith("const") if index < len(types) else tensor.buffer in self.written
            (reads if constant else writes).append(Access(tensor.buffer, self.bytes_of(tensor)))
        self.written |= {access.buffer for access in writes}
        kind = "cpp" if types else "unread"
        return Kernel(
            position, call.name, tuple(reads), tuple(writes), self.module.name, call.line, _origins(call), call.aten,
            kind=kind, rows=self.rows(tensors),
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
                self.uses[key] = kernelcode.read_uses(code, numbers)
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
        whole = self.numel(self.tensor(tensor).size)
        passes = _passes(sites)
        if not code.generated or any(not s.index.digits and s.index.linear is None for s in sites):
            return Access(tensor.buffer, self.bytes_of(tensor), passes)
        reached = {site.key: digits.distinct(site.index.digits, site.bounds) for site in sites}
        count = sum(reached.values())
        held = self.module.tensors.get(tensor.buffer)
        limit = max((n for n in (whole, self.numel(held.size) if held else None) if n is not None), default=None)
        return Access(tensor.buffer, (count if limit is None else min(count, limit)) * width, passes)

    def copies(self, code: KernelCode, pointers: list[tuple[str, Tensor]], uses: Uses | None) -> tuple[Copy, ...]:
        if uses is None or not code.generated:
            return ()
        names = {parameter: tensor.buffer for parameter, tensor in pointers}
        return tuple(
            Copy(names[load], names[store], COPY_SAME if same else COPY_LAYOUT, dtypes)
            for load, store, same, dtypes in kernelcode.plain_copies(code, uses)
            if load in names and store in names
        )

    def rows(self, tensors: Iterable[Tensor]) -> str:
        """The leading size of the largest tensor: launches over the same rows have the same."""
        largest, text = -1, ""
        for tensor in map(self.tensor, tensors):
            count = self.numel(tensor.size)
            if tensor.size and len(tensor.size) > 1 and count is not None and count > largest:
                largest, text = count, ast.unparse(tensor.size[0])
        return text

    # ---- calls of what was not generated

    def extern(self, position: int, call: Call) -> Extern:
        known = opaque.operator(call.name)
        reads: list[Access] = []
        writes = [Access(tensor.buffer, self.bytes_of(tensor)) for tensor in call.out]
        mutates: list[str] = []
        for index, argument in enumerate(call.arguments):
            if not isinstance(argument, Tensor):
                continue
            access = Access(argument.buffer, self.bytes_of(argument))
            fresh = argument.buffer not in self.written
            if index in known.mutates or (fresh and not opaque.is_known(call.name)):
                writes.append(access)
                if not fresh:
                    mutates.append(argument.buffer)
            if not fresh:
                reads.append(access)
        self.written |= {access.buffer for access in writes}
        return Extern(
            position, call.name, tuple(reads), tuple(writes), self.module.name, call.line, _origins(call), call.aten,
            tuple(mutates), arguments=tuple(_argument_text(argument) for argument in call.arguments),
        )  # fmt: skip


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
