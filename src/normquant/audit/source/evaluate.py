"""A generated module at one set of sizes: a `Program`."""

import ast
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from normquant.audit import operators, size_expressions
from normquant.audit.program import (
    COPY_LAYOUT,
    COPY_SAME,
    DTYPE_BYTES,
    Access,
    Buffer,
    Copy,
    Extern,
    Kernel,
    Origin,
    Program,
    ProgramLaunch,
    View,
)
from normquant.audit.source import index_reach, kernel_code, tensor_facts
from normquant.audit.source.generated_module import Call, GeneratedModule, Size, Tensor
from normquant.audit.source.kernel_code import KernelCode
from normquant.audit.source.symbolic_values import MemoryOp, MemoryOps


def program(module: GeneratedModule, sizes: Mapping[str, int], compiled: Mapping[str, Buffer]) -> Program:
    """The program of `module`; sizes other than `sizes` are those that it was compiled with.

    `compiled` is what the compiler knew of its buffers: for tensors whose size or dtype the code does not show.
    """
    module = replace(module, tensors=dict(module.tensors), notes=[*module.notes])  # they are completed for these sizes
    codes = tensor_facts.kernels(module)
    tensor_facts.fill_in(module, codes, compiled)
    return _Evaluation(module, {**module.hints, **sizes}, codes).program()


@dataclass
class _Evaluation:
    module: GeneratedModule
    values: dict[str, int]
    codes: dict[str, KernelCode]
    written: set[str] = field(default_factory=set)
    ops: dict[tuple[str, tuple[tuple[str, int], ...]], MemoryOps | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lines = self.module.code.text.splitlines()

    def program(self) -> Program:
        module = self.module
        self.written = {*module.inputs, *module.constants}
        launches = tuple(self.launch(position, call) for position, call in enumerate(module.calls))
        buffers = {name: self.buffer(tensor) for name, tensor in module.tensors.items()}
        known = {name: self.values[name] for name in module.symbols() if name in self.values}
        return Program(launches, buffers, tuple(module.outputs), known, module.code.name, tuple(module.notes))

    def launch(self, position: int, call: Call) -> ProgramLaunch:
        if call.kernel is None:
            return self.extern(position, call)
        code = self.codes.get(call.kernel)
        return self.kernel(position, call, code) if code else self.unread(position, call)

    def common(self, position: int, call: Call, reads: Iterable[Access], writes: Iterable[Access]) -> dict[str, Any]:
        """The fields that every launch has; marks what it writes as written."""
        reads, writes = tuple(reads), tuple(writes)
        self.written |= {access.buffer for access in writes}
        origins = tuple(Origin(file, line, code) for file, line, code in call.origins)
        return {
            "position": position, "name": call.name, "reads": reads, "writes": writes, "branch": call.branch,
            "file": self.module.code.name, "line": call.line, "code": self.source_line(call.line),
            "origins": origins, "aten": call.aten,
        }  # fmt: skip

    def source_line(self, number: int) -> str:
        """A line of the generated code, from 1; "" where there is none."""
        return self.lines[number - 1].strip() if 0 < number <= len(self.lines) else ""

    # ---- sizes

    def number(self, node: ast.expr) -> int | None:
        try:
            return size_expressions.evaluate(node, self.values)
        except size_expressions.UnknownSize:
            return None

    def numel(self, tensor: Tensor) -> int | None:
        """Distinct elements of a tensor: a dimension of stride 0 repeats the same ones."""
        if tensor.size is None:
            return None
        strides = [self.number(step) for step in tensor.stride or ()] or [None] * len(tensor.size)
        extents = [self.number(e) for e, step in zip(tensor.size, strides, strict=False) if step != 0]
        known = [extent for extent in extents if extent is not None and extent >= 0]
        return math.prod(known) if len(known) == len(extents) else None

    def tensor(self, tensor: Tensor) -> Tensor:
        """The tensor with what is now known of its buffer."""
        held = self.module.tensors.get(tensor.buffer, tensor)
        return replace(tensor, dtype=tensor.dtype or held.dtype) if tensor.is_view else held

    def is_written(self, name: str) -> bool:
        """Whether a tensor, or one that it is an alias of, holds data by now."""
        for _ in range(len(self.module.same_as) + 1):
            if name in self.written:
                return True
            if name not in self.module.same_as:
                return False
            name = self.module.same_as[name]
        return False

    def whole(self, tensor: Tensor) -> Access:
        """An access to all of a tensor."""
        count, width = self.numel(self.tensor(tensor)), DTYPE_BYTES.get(self.tensor(tensor).dtype)
        if count is None or width is None:
            self.module.note(f"the size of {tensor.buffer} is not in the code: its bytes are not counted")
        return Access(tensor.buffer, (count or 0) * (width or 0))

    def buffer(self, tensor: Tensor) -> Buffer:
        module, name = self.module, tensor.buffer
        named = {"input": module.inputs, "constant": module.constants, "output": module.outputs}
        role = next((role for role, names in named.items() if name in names), "intermediate")
        tensor = self.tensor(tensor)
        size = (self.numel(tensor) or 0) * DTYPE_BYTES.get(tensor.dtype, 0)
        return Buffer(name, tensor.dtype, _texts(tensor.size), _texts(tensor.stride), size, role, tensor.storage)

    # ---- generated kernels

    def kernel(self, position: int, call: Call, code: KernelCode) -> Kernel:
        pointers = tensor_facts.pointers(code, call)
        ops = self.memory_ops(code, call)
        reads, writes = self.accesses(code, pointers, ops)
        copies = self.copies(code, pointers, ops)
        return Kernel(
            **self.common(position, call, reads, writes),
            kind=code.kind,
            rows=self.rows(reads, writes),
            copies=copies,
            is_copy=bool(copies) and ops is not None and len(copies) == len(ops.stores),
        )

    def unread(self, position: int, call: Call) -> Kernel:
        """A kernel without Triton text: whole buffers, read or written by their C++ types, else by first use."""
        types = self.module.cpp_kernels.get(call.name, ())
        reads: list[Access] = []
        writes: list[Access] = []
        for index, tensor in enumerate(argument for argument in call.arguments if isinstance(argument, Tensor)):
            constant = types[index].startswith("const") if index < len(types) else self.is_written(tensor.buffer)
            (reads if constant else writes).append(self.whole(tensor))
        rows, kind = self.rows(reads, writes), "cpp" if types else "unread"
        return Kernel(**self.common(position, call, reads, writes), kind=kind, rows=rows)

    def memory_ops(self, code: KernelCode, call: Call) -> MemoryOps | None:
        """What the kernel loads and stores in this call; None, with a note, where that is not known."""
        passed = zip(code.parameters, call.arguments, strict=False)
        sizes = {name: a for name, a in passed if name not in code.pointers and not isinstance(a, Tensor)}
        numbers = {name: number for name, size in sizes.items() if (number := self.number(size)) is not None}
        key = (call.name, tuple(sorted(numbers.items())))
        if key not in self.ops:
            try:
                self.ops[key] = kernel_code.read_memory_ops(code, numbers)
            except (size_expressions.UnknownSize, RecursionError) as error:
                reason = error or "too deeply nested"
                self.module.note(f"kernel {call.name}: {reason} is not known; whole buffers are counted")
                self.ops[key] = None
        return self.ops[key]

    def accesses(
        self, code: KernelCode, pointers: Iterable[tuple[str, Tensor]], ops: MemoryOps | None
    ) -> tuple[list[Access], list[Access]]:
        reads, writes = [], []
        for parameter, tensor in pointers:
            stored = [one for one in ops.stores if one.op.pointer == parameter] if ops else []
            loads = [op for op in ops.loads if op.pointer == parameter] if ops else []
            loads += [one.op for one in stored if one.atomic]
            if loads:
                reads.append(self.access(code, parameter, tensor, loads))
            if stored:
                writes.append(self.access(code, parameter, tensor, [one.op for one in stored]))
            if not loads and not stored:  # it is used in a way that is not followed
                used = writes if parameter in code.mutated or "out" in parameter else reads
                used.append(self.whole(tensor))
        return reads, writes

    def access(self, code: KernelCode, parameter: str, tensor: Tensor, ops: list[MemoryOp]) -> Access:
        passes = _passes(ops)
        if not code.generated or any(not op.index.digits and op.index.linear is None for op in ops):
            return replace(self.whole(tensor), loads=passes)
        count = sum({op.key: index_reach.distinct(op.index.digits, op.bounds) for op in ops}.values())
        sizes = (self.numel(self.tensor(tensor)), self.numel(self.module.tensors.get(tensor.buffer, tensor)))
        limit = max((size for size in sizes if size is not None), default=count)
        return Access(tensor.buffer, min(count, limit) * DTYPE_BYTES.get(code.pointers[parameter], 0), passes)

    def copies(
        self, code: KernelCode, pointers: Iterable[tuple[str, Tensor]], ops: MemoryOps | None
    ) -> tuple[Copy, ...]:
        if ops is None or not code.generated:
            return ()
        names = {parameter: tensor.buffer for parameter, tensor in pointers}
        return tuple(
            Copy(names[load], names[store], COPY_SAME if same else COPY_LAYOUT, dtypes)
            for load, store, same, dtypes in ops.plain_copies(code.pointers)
            if load in names and store in names
        )

    def rows(self, reads: Iterable[Access], writes: Iterable[Access]) -> str:
        """The leading size of the largest tensor written, else read: equal for launches over the same rows."""
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
        passed = {index: a for index, a in enumerate(call.arguments) if isinstance(a, Tensor)}
        writes = [self.whole(part) for tensor in call.out for part in tensor_facts.parts(self.module, tensor)]
        reads: list[Access] = []
        mutates: list[str] = []
        for index, tensor in passed.items():
            access, fresh = self.whole(tensor), not self.is_written(tensor.buffer)
            if index in known.mutates or (fresh and not operators.is_known(call.name)):
                writes.append(access)
                if not fresh:
                    mutates.append(tensor.buffer)
            if not fresh:
                reads.append(access)
        return Extern(
            **self.common(position, call, reads, writes),
            mutates=tuple(mutates),
            arguments=tuple(_argument_text(argument) for argument in call.arguments),
            views={index: self.view(tensor) for index, tensor in passed.items()},
        )

    def view(self, tensor: Tensor) -> View:
        tensor = self.tensor(tensor)
        return View(tensor.buffer, _texts(tensor.size), _texts(tensor.stride))


def _passes(ops: Iterable[MemoryOp]) -> int:
    """In how many passes over the data the same elements are loaded."""
    sections: dict[tuple[object, ...], set[int]] = {}
    for op in ops:
        sections.setdefault(op.key, set()).add(op.section)
    return max((len(found) for found in sections.values()), default=1)


def _texts(size: Size | None) -> tuple[str, ...]:
    return tuple(ast.unparse(extent) for extent in size or ())


def _argument_text(argument: Tensor | ast.expr) -> str:
    if isinstance(argument, Tensor):
        return argument.buffer
    text = ast.unparse(argument)
    return text if len(text) <= 80 else text[:77] + "..."
