"""The module that Inductor generates, read: its kernels' text, and the calls that its `call` function makes, in order.

Sizes stay expressions. The code is parsed, never executed.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_SYMBOL = re.compile(r"^(s|u|f|zf|zuf|ps|ks|ws)\d+$")
_ALLOCATES = re.compile(r"^(empty_strided\w*|_?empty_strided\w*)$")
_IGNORED = frozenset({
    "assert_size_stride", "assert_alignment", "get_raw_stream", "set_device", "clear", "start_graph", "end_graph",
    "run_intermediate_hooks", "check_deferred_runtime_asserts", "synchronize", "copy_if_misaligned", "append", "print",
    "_check", "record_stream", "wait_stream", "device", "range", "len", "item",
})  # fmt: skip
_ENTRY_POINTS = ("call", "inductor_entry", "forward")
_DEEPEST_CALL = 16
_MOST_CALLS = 200_000
_FRAGMENT = re.compile(r'^#\s+%(\w+) : Tensor "(\w+)\[([^\]]*)\]\[([^\]]*)\]')
_CONSTANT = re.compile(r"^(\w+) = None\s+# .*?torch\.(\w+) \(([^)]*)\) \(([^)]*)\)")
_ATEN = re.compile(r"Original ATen: \[([^\]]*)\]")
_FILE = re.compile(r"^\s*# File: (.+?):(\d+) in .*?, code: (.*)$")
_FX_DTYPES = {
    "bf16": "bfloat16", "f16": "float16", "f32": "float32", "f64": "float64", "i64": "int64", "i32": "int32",
    "i16": "int16", "i8": "int8", "u8": "uint8", "b8": "bool", "f8e4m3fn": "float8_e4m3fn", "f8e5m2": "float8_e5m2",
    "f8e8m0fnu": "float8_e8m0fnu",
}  # fmt: skip

Size = tuple[ast.expr, ...]


class NotGenerated(ValueError):  # noqa: N818 - what the text is not
    """Text that is not a module written by Inductor."""


@dataclass(frozen=True)
class Tensor:
    """A name for memory: a buffer, or a view of one."""

    buffer: str
    storage: str
    dtype: str = ""
    size: Size | None = None
    stride: Size | None = None


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


def read_module(text: str, name: str) -> Module:
    """Read one generated module; NotGenerated when the text is something else."""
    if "async_compile" not in text and "extern_kernels" not in text and "AOT ID" not in text:
        raise NotGenerated("not code that Inductor generated")
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error) or type(error).__name__
        raise NotGenerated(f"cannot be parsed as Python ({reason})") from None
    module = Module(name)
    reader = _Reader(module, tree, text.splitlines())
    if reader.entry is None:
        raise NotGenerated("no call() function: not code that Inductor generated, or cut short")
    reader.read()
    return module


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an attribute access; '' for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    return ".".join([node.id, *reversed(parts)])


def operator_name(path: str) -> str:
    """`namespace.operator` of the path that a call is written with."""
    path = path.removeprefix("torch.ops.")
    if path.startswith("extern_kernels."):
        return f"aten.{path.removeprefix('extern_kernels.').removesuffix('_out')}"
    parts = path.split(".")
    return ".".join(parts[:2]) if len(parts) > 2 else path


class _Reader:
    def __init__(self, module: Module, tree: ast.Module, lines: list[str]) -> None:
        self.module = module
        self.lines = lines
        self.functions: dict[str, ast.FunctionDef] = {}
        self.entry: ast.FunctionDef | None = None
        self.names: dict[str, Tensor | ast.expr] = {}
        self.lists: dict[str, list[ast.expr]] = {}
        self.depth = 0
        self.shapes_in_comments = dict(_shapes_in_comments(lines))
        for statement in tree.body:
            self.top_level(statement)
        self.entry = next((self.functions[n] for n in _ENTRY_POINTS if n in self.functions), None)

    def top_level(self, statement: ast.stmt) -> None:
        match statement:
            case ast.FunctionDef(name=name):
                self.functions[name] = statement
            case ast.ClassDef(body=body):
                for member in body:
                    if isinstance(member, ast.FunctionDef):
                        self.functions[member.name] = member
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call(func=func, args=args)):
                self.kernel(name, dotted(func), args)

    def kernel(self, name: str, maker: str, args: list[ast.expr]) -> None:
        texts = [a.value for a in args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        if maker == "async_compile.triton" and texts:
            self.module.kernels[name] = texts[-1] if len(texts) < 3 else texts[1]
        elif maker.startswith("async_compile.cpp") and args and isinstance(args[0], ast.List):
            kinds = (e.value for e in args[0].elts if isinstance(e, ast.Constant))
            self.module.cpp_kernels[name] = tuple(str(kind) for kind in kinds)
        elif maker == "async_compile.multi_kernel" and len(args) > 1 and isinstance(args[1], ast.List):
            first = next((dotted(e) for e in args[1].elts), "")
            if first in self.module.kernels:
                self.module.kernels[name] = self.module.kernels[first]
                self.module.notes.append(f"{name} chooses between kernels when it runs; {first} is counted")

    def read(self) -> None:
        assert self.entry is not None
        self.examples()
        for name, tensor in self.constants():
            self.module.constants.append(name)
            self.names[name] = self.module.tensors[name] = tensor
        self.function(self.entry)

    def constants(self) -> Iterator[tuple[str, Tensor]]:
        for line in self.lines:
            found = _CONSTANT.match(line) if " = None " in line else None
            if found:
                name, dtype, size, stride = found.groups()
                yield name, Tensor(name, name, dtype, _sizes(size), _sizes(stride))

    def examples(self) -> None:
        """The sizes and dtypes of the inputs that the module's own benchmark would make."""
        function = self.functions.get("get_args") or self.functions.get("benchmark_compiled_module")
        for statement in function.body if function else ():
            match statement:
                case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=int() as number)):
                    self.module.hints[name] = number
                case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call(func=func, args=[size, stride], keywords=keywords)) if (
                    dotted(func).endswith("rand_strided")
                ):  # fmt: skip
                    dtype = next((dotted(k.value) for k in keywords if k.arg == "dtype"), "")
                    tensor = Tensor(name, name, dtype.removeprefix("torch."), _elements(size), _elements(stride))
                    self.module.tensors[name] = tensor

    def function(self, function: ast.FunctionDef, arguments: list[ast.expr] | None = None) -> list[ast.expr]:
        """Read a function's body; `arguments` is what its one list parameter holds. Gives back what it returns."""
        if self.depth >= _DEEPEST_CALL:
            raise NotGenerated("functions that call each other too deeply")
        self.depth += 1
        given = [self.resolve(argument) for argument in arguments] if arguments is not None else None
        returned: list[ast.expr] = []
        self.block(function.body, given, returned)
        self.depth -= 1
        if self.depth == 0:
            self.module.outputs = [t.buffer for t in map(self.resolve, returned) if isinstance(t, Tensor)]
        return returned

    def block(self, body: list[ast.stmt], given: list[Tensor | ast.expr] | None, returned: list[ast.expr]) -> None:
        for statement in body:
            match statement:
                case ast.With(body=inner) | ast.For(body=inner):
                    self.block(inner, given, returned)
                case ast.While(body=inner):
                    self.note("a loop whose number of turns depends on data is counted once")
                    self.block(inner, given, returned)
                case ast.Try(body=inner, finalbody=final):
                    self.block([*inner, *final], given, returned)
                case ast.If(body=inner, orelse=other):
                    self.note("both sides of a branch that depends on data are counted")
                    self.block(inner, given, returned)
                    self.block(other, given, returned)
                case ast.Return(value=ast.Tuple(elts=parts) | ast.List(elts=parts)):
                    returned[:] = parts
                case ast.Assign(targets=[target], value=value):
                    self.assign(target, value, statement.lineno, given)
                case ast.Expr(value=ast.Call() as call):
                    self.call(call, statement.lineno, None)

    def note(self, text: str) -> None:
        if text not in self.module.notes:
            self.module.notes.append(text)

    def assign(self, target: ast.expr, value: ast.expr, line: int, given: list[Tensor | ast.expr] | None) -> None:
        match target, value:
            case (ast.Tuple(elts=parts) | ast.List(elts=parts)), ast.Name(id=source) if source.endswith("args"):
                self.parameters([p.id for p in parts if isinstance(p, ast.Name)], given)
            case (ast.Tuple(elts=parts) | ast.List(elts=parts)), ast.Call() as call:
                results = self.call(call, line, [p.id for p in parts if isinstance(p, ast.Name)])
                self.bind_results(parts, results)
            case ast.Name(id=name), _:
                self.bind(name, value, line)

    def parameters(self, names: list[str], given: list[Tensor | ast.expr] | None) -> None:
        for position, name in enumerate(names):
            if given is not None:
                if position < len(given):
                    self.names[name] = given[position]
                continue
            if name in self.module.hints:  # a size
                self.names[name] = ast.Name(name)
                continue
            self.module.inputs.append(name)
            dtype, size, stride = self.shapes_in_comments.get(name, ("", None, None))
            example = self.module.tensors.get(name, Tensor(name, name))
            tensor = Tensor(name, name, example.dtype or dtype, size or example.size, stride or example.stride)
            self.names[name] = self.module.tensors[name] = tensor

    def bind(self, name: str, value: ast.expr, line: int) -> None:
        match value:
            case ast.Name(id=source) if _SYMBOL.match(name):  # a size under its own name
                if source in self.module.hints:
                    self.module.hints[name] = self.module.hints[source]
                elif source in self.module.inputs:
                    self.module.inputs.remove(source)
                    self.module.tensors.pop(source, None)
                self.names[name] = self.names[source] = ast.Name(name)
            case ast.Name() | ast.Subscript():
                self.alias(name, value)
            case ast.List(elts=parts):
                self.lists[name] = parts
            case ast.Call(func=func) if dotted(func).rpartition(".")[2] == "copy_if_misaligned":
                return
            case ast.Call(func=func) as call:
                tensor = self.allocation(name, dotted(func).rpartition(".")[2], call)
                if tensor is not None:
                    self.names[name] = self.module.tensors[name] = tensor
                    return
                self.bind_results([ast.Name(name)], self.call(call, line, [name]), whole=name)
            case ast.BinOp() | ast.UnaryOp() | ast.Constant():
                self.names[name] = self.substituted(value)

    def alias(self, name: str, value: ast.expr) -> None:
        held = self.resolve(value)
        if not isinstance(held, Tensor):
            if isinstance(value, ast.Subscript):
                self.part(name, value)
            return
        # memory under a new name: what is written from here on is another tensor
        dtype, size, stride = self.shapes_in_comments.get(name, ("", None, None))
        if isinstance(value, ast.Subscript) and held.size is None:
            tensor = Tensor(name, held.storage, dtype, size, stride)
        else:
            tensor = Tensor(name, held.storage, held.dtype, held.size, held.stride)
        self.names[name] = self.module.tensors[name] = tensor

    def part(self, name: str, value: ast.Subscript) -> None:
        """One of several results of a call or a subgraph."""
        match value:
            case ast.Subscript(value=ast.Name(id=whole), slice=ast.Constant(value=int() as index)):
                parts = self.lists.get(whole, [])
                if index < len(parts) and isinstance(held := self.resolve(parts[index]), Tensor):
                    self.names[name] = held

    def allocation(self, name: str, maker: str, call: ast.Call) -> Tensor | None:
        if _ALLOCATES.match(maker) and len(call.args) >= 2:
            kinds = [*call.args[2:], *(k.value for k in call.keywords if k.arg == "dtype")]
            dtype = next((d for d in map(dotted, kinds) if d.startswith("torch.")), "")
            return Tensor(name, name, dtype.removeprefix("torch."), self.size(call.args[0]), self.size(call.args[1]))
        if maker in ("_alloc_from_pool", "alloc_from_pool") and len(call.args) >= 5:
            dtype = dotted(call.args[2]).removeprefix("torch.")
            return Tensor(name, name, dtype, self.size(call.args[3]), self.size(call.args[4]))
        if maker == "reinterpret_tensor":
            view = self.view(call)
            return Tensor(name, view.storage, view.dtype, view.size, view.stride) if view else None
        return None

    def view(self, call: ast.Call) -> Tensor | None:
        if len(call.args) < 3:
            return None
        base = self.resolve(call.args[0])
        if not isinstance(base, Tensor):
            return None
        return Tensor(base.buffer, base.storage, base.dtype, self.size(call.args[1]), self.size(call.args[2]))

    def size(self, node: ast.expr) -> Size | None:
        elements = _elements(node)
        return tuple(self.substituted(element) for element in elements) if elements is not None else None

    def substituted(self, node: ast.expr) -> ast.expr:
        """A size expression with the names that stand for other sizes written out."""
        if isinstance(node, ast.Name):
            held = self.names.get(node.id)
            return held if isinstance(held, ast.expr) else node
        if isinstance(node, ast.BinOp):
            return ast.BinOp(self.substituted(node.left), node.op, self.substituted(node.right))
        if isinstance(node, ast.UnaryOp):
            return ast.UnaryOp(node.op, self.substituted(node.operand))
        return node

    def resolve(self, node: "ast.expr | Tensor") -> "Tensor | ast.expr":
        match node:
            case ast.Name(id=name):
                return self.names.get(name, node)
            case ast.Subscript(value=ast.Name(id=name)):
                held = self.names.get(name)
                return held if isinstance(held, Tensor) else node
            case ast.Call(func=func) if dotted(func).rpartition(".")[2] in ("reinterpret_tensor", "_reinterpret_tensor"):
                return self.view(node) or node
            case ast.Call(func=ast.Attribute(value=inner)) if not node.args:  # buf0.view(...), buf0.item()
                held = self.resolve(inner)
                return held if isinstance(held, Tensor) else node
        return node

    def bind_results(self, targets: list[ast.expr], results: list[ast.expr] | None, whole: str = "") -> None:
        if results is None:
            return
        if whole:
            self.lists[whole] = results
            return
        for target, result in zip(targets, results, strict=False):
            held = self.resolve(result)
            if isinstance(target, ast.Name) and isinstance(held, Tensor):
                self.names[target.id] = held

    def call(self, call: ast.Call, line: int, results: list[str] | None) -> list[ast.expr] | None:
        """Note what a call launches. Gives back the returned expressions when it is a function of this module."""
        if len(self.module.calls) >= _MOST_CALLS:
            raise NotGenerated(f"more than {_MOST_CALLS} launches")
        path = dotted(call.func)
        inner = self.subgraph(call.func, path)
        if inner is not None:
            return self.function(inner, self.list_argument(call))
        owner, _, method = path.rpartition(".")
        if method == "run" and (owner in self.module.kernels or owner.startswith(("triton_", "multi_kernel"))):
            self.add(owner, owner if owner in self.module.kernels else None, call, line, ())
        elif path in self.module.cpp_kernels:
            self.add(path, path, call, line, ())
        elif path and method not in _IGNORED and path not in _IGNORED:
            self.extern(path, call, line, results)
        elif method == "assert_size_stride" and len(call.args) >= 3 and isinstance(call.args[0], ast.Name):
            self.asserted(call.args[0].id, call)
        return None

    def subgraph(self, func: ast.expr, path: str) -> ast.FunctionDef | None:
        match func:
            case ast.Subscript(value=ast.Attribute(attr="partitions"), slice=ast.Constant(value=int() as index)):
                return self.functions.get(f"partition_{index}")
        return self.functions.get(path) if path not in _ENTRY_POINTS else None

    def list_argument(self, call: ast.Call) -> list[ast.expr]:
        match call.args:
            case [ast.Name(id=name)]:
                return self.lists.get(name, [])
            case [ast.List(elts=parts)]:
                return parts
        return list(call.args)

    def asserted(self, name: str, call: ast.Call) -> None:
        held = self.names.get(name)
        if isinstance(held, Tensor):
            size, stride = self.size(call.args[1]), self.size(call.args[2])
            tensor = Tensor(held.buffer, held.storage, held.dtype, size, stride)
            self.names[name] = self.module.tensors[name] = tensor

    def extern(self, path: str, call: ast.Call, line: int, results: list[str] | None) -> None:
        arguments = [self.resolve(argument) for argument in call.args]
        outs = [k.value for k in call.keywords if k.arg in ("out", "out0", "out1", "outs")]
        held = [self.resolve(o) for out in outs for o in (out.elts if isinstance(out, (ast.Tuple, ast.List)) else [out])]
        written = [tensor for tensor in held if isinstance(tensor, Tensor)]
        for name in results or ():
            dtype, size, stride = self.shapes_in_comments.get(name, ("", None, None))
            tensor = Tensor(name, name, dtype, size, stride)
            self.names[name] = self.module.tensors[name] = tensor
            written.append(tensor)
        named = path.startswith(("torch.ops.", "aten.", "extern_kernels.", "inductor_ops.", "_quantized."))
        if not named and not any(isinstance(a, Tensor) for a in [*arguments, *written]):
            return
        self.add(operator_name(path), None, call, line, tuple(written))

    def add(self, name: str, kernel: str | None, call: ast.Call, line: int, out: tuple[Tensor, ...]) -> None:
        flat: list[ast.expr] = []
        for argument in (*call.args, *(k.value for k in call.keywords if k.arg not in ("out", "stream", "grid"))):
            flat.extend(argument.elts if isinstance(argument, (ast.List, ast.Tuple)) else [argument])
        resolved = tuple(self.resolved_argument(argument) for argument in flat)
        aten, origins = self.comments(line)
        self.module.calls.append(Call(name, kernel, resolved, out, line, aten, origins))

    def resolved_argument(self, node: ast.expr) -> Tensor | ast.expr:
        held = self.resolve(node)
        return held if isinstance(held, Tensor) else self.substituted(held)

    def comments(self, line: int) -> tuple[tuple[str, ...], tuple[tuple[str, int, str], ...]]:
        """What the comment lines above a call say about where it comes from."""
        aten: tuple[str, ...] = ()
        origins: list[tuple[str, int, str]] = []
        for above in range(line - 2, max(-1, line - 14), -1):
            text = self.lines[above].strip() if above < len(self.lines) else ""
            if not (text.startswith("#") or "get_raw_stream" in text or "_numel = " in text or "numel = " in text):
                break
            found = _ATEN.search(text)
            if found and found.group(1):
                aten = tuple(part.strip() for part in found.group(1).split(","))
            located = _FILE.match(text)
            if located:
                origins.append((located.group(1), int(located.group(2)), located.group(3)))
        return aten, tuple(reversed(origins))


def _elements(node: ast.expr) -> Size | None:
    return tuple(node.elts) if isinstance(node, (ast.Tuple, ast.List)) else None


def _sizes(text: str) -> Size | None:
    try:
        parsed = ast.parse(f"({text},)" if text.strip() and not text.rstrip().endswith(",") else f"({text})", mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return _elements(parsed.body)


def _shapes_in_comments(lines: list[str]) -> Iterator[tuple[str, tuple[str, Size | None, Size | None]]]:
    """Shapes from the graph fragments that Inductor writes above each kernel."""
    seen: set[str] = set()
    for line in lines:
        found = _FRAGMENT.match(line) if line.startswith("#   %") else None
        if found and found.group(1) not in seen:
            name, dtype, size, stride = found.groups()
            seen.add(name)
            yield name, (_FX_DTYPES.get(dtype, ""), _sizes(size), _sizes(stride))
