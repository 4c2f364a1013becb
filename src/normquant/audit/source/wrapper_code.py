"""Reads a module that Inductor generated: the text of its kernels, and in order the calls that `call` makes.

Sizes stay expressions. The code is parsed, never executed.
"""

import ast

from normquant.audit.program import GeneratedCode
from normquant.audit.source import comments
from normquant.audit.source.generated_module import Call, GeneratedModule, NotGenerated, Tensor, is_symbol
from normquant.audit.source.wrapper_scope import Scope, dotted

_ASSERTIONS = frozenset({"assert_size_stride", "assert_size_stride_grouped", "assert_tensor_metadata"})
_IGNORED = _ASSERTIONS | frozenset({
    "assert_alignment", "get_raw_stream", "set_device", "clear", "start_graph", "end_graph",
    "run_intermediate_hooks", "check_deferred_runtime_asserts", "synchronize", "copy_if_misaligned", "append", "print",
    "_check", "record_stream", "wait_stream", "device", "range", "len", "item",
})  # fmt: skip
_CPP_WRAPPER_PARTS = ("cpp_wrapper_src", "torch/csrc/inductor/cpp_wrapper/", "torch/csrc/inductor/aoti_include/")
CPP_WRAPPER = (
    "a wrapper that Inductor generated in C++, by cpp_wrapper or AOTInductor; only Python wrappers are read: compile "
    "the same model with torch.compile and without cpp_wrapper, and audit that"
)
_ENTRY_POINTS = ("call", "inductor_entry", "forward")
_DEEPEST_CALL = 16
_MOST_CALLS = 200_000
_MOST_STATEMENTS = 500_000  # counted per call: hostile functions could call each other exponentially often


def read_module(code: GeneratedCode) -> GeneratedModule:
    """Read one generated module; NotGenerated when the text is something else."""
    if is_cpp_wrapper(code.text):
        raise NotGenerated(CPP_WRAPPER)
    if not is_generated(code.text):
        raise NotGenerated("not code that Inductor generated")
    try:
        tree = ast.parse(code.text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error) or type(error).__name__
        raise NotGenerated(f"cannot be parsed as Python ({reason})") from None
    module = GeneratedModule(code)
    reader = _WrapperReader(module, tree, code.text.splitlines())
    if reader.entry is None:
        raise NotGenerated("no call() function: not code that Inductor generated, or cut short")
    reader.read()
    return module


def is_generated(text: str) -> bool:
    """Whether a text contains what every module that Inductor writes contains."""
    return "async_compile" in text or "extern_kernels" in text or "AOT ID" in text


def is_cpp_wrapper(text: str) -> bool:
    """Whether a text is a wrapper in C++, alone or inside of the Python module that loads it."""
    return any(part in text for part in _CPP_WRAPPER_PARTS)


def operator_name(path: str) -> str:
    """`namespace.operator`, from the path that a call spells."""
    path = path.removeprefix("torch.ops.")
    if path.startswith("extern_kernels."):
        return f"aten.{path.removeprefix('extern_kernels.').removesuffix('_out')}"
    parts = path.split(".")
    return ".".join(parts[:2]) if len(parts) > 2 else path


class _WrapperReader:
    """Follows the statements of `call` and of the functions that it calls."""

    def __init__(self, module: GeneratedModule, tree: ast.Module, lines: list[str]) -> None:
        self.module = module
        self.lines = lines
        self.functions: dict[str, ast.FunctionDef] = {}
        self.entry: ast.FunctionDef | None = None
        self.scope = Scope(module, lines)
        self.depth = 0
        self.statements = 0
        self.returns = False  # whether the entry point has returned
        self.branch = ""
        self.branches = 0
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
        for tensor in comments.constants(self.lines):
            self.module.constants.append(tensor.buffer)
            self.scope.set_tensor(tensor)
        self.function(self.entry)
        if not self.returns:
            raise NotGenerated("call() does not return: cut short")

    def examples(self) -> None:
        """Read the sizes and dtypes of the inputs that the module's own benchmark makes."""
        function = self.functions.get("get_args") or self.functions.get("benchmark_compiled_module")
        for statement in function.body if function else ():
            match statement:
                case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=int() as number)):
                    self.module.hints[name] = number
                case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call(args=[size, stride]) as call) if dotted(
                    call.func
                ).endswith("rand_strided"):
                    dtype = next((dotted(k.value) for k in call.keywords if k.arg == "dtype"), "")
                    sizes = comments.elements(size), comments.elements(stride)
                    self.module.tensors[name] = Tensor(name, name, dtype.removeprefix("torch."), *sizes)

    def function(self, function: ast.FunctionDef, arguments: list[ast.expr] | None = None) -> list[ast.expr]:
        """Read a function's body; `arguments` are the items of its one list parameter. Returns what it returns."""
        if self.depth >= _DEEPEST_CALL:
            raise NotGenerated("functions that call each other too deeply")
        self.depth += 1
        given = [self.scope.resolve(argument) for argument in arguments] if arguments is not None else None
        returned: list[ast.expr] = []
        self.block(function.body, given, returned)
        self.depth -= 1
        if self.depth == 0:
            self.module.outputs = [t.buffer for t in map(self.scope.resolve, returned) if isinstance(t, Tensor)]
        return returned

    def block(self, body: list[ast.stmt], given: list[Tensor | ast.expr] | None, returned: list[ast.expr]) -> None:
        for statement in body:
            self.statements += 1
            if self.statements > _MOST_STATEMENTS:
                raise NotGenerated(f"more than {_MOST_STATEMENTS} statements to follow")
            match statement:
                case ast.With(body=inner) | ast.For(body=inner):
                    self.block(inner, given, returned)
                case ast.While(body=inner):
                    self.module.note("a loop whose number of iterations depends on data is counted once")
                    self.block(inner, given, returned)
                case ast.Try(body=inner, finalbody=final):
                    self.block([*inner, *final], given, returned)
                case ast.If():
                    self.both_sides(statement, given, returned)
                case ast.Return(value=value):
                    self.returns = self.returns or self.depth == 1
                    returned[:] = value.elts if isinstance(value, (ast.Tuple, ast.List)) else [value] if value else []
                case ast.Assign(targets=[target], value=value):
                    self.assign(target, value, statement.lineno, given)
                case ast.Expr(value=ast.Call() as call):
                    self.call(call, statement.lineno, None)

    def both_sides(self, choice: ast.If, given: list[Tensor | ast.expr] | None, returned: list[ast.expr]) -> None:
        self.module.note("both sides of a branch that depends on data are counted")
        outer, self.branches = self.branch, self.branches + 1
        for side, body in (("a", choice.body), ("b", choice.orelse)):
            self.branch = f"{outer}{self.branches}{side}"
            self.block(body, given, returned)
        self.branch = outer

    def assign(self, target: ast.expr, value: ast.expr, line: int, given: list[Tensor | ast.expr] | None) -> None:
        match target, value:
            case ((ast.Tuple(elts=parts) | ast.List(elts=parts)), ast.Name(id=source)) if source.endswith("args"):
                self.scope.parameters([p.id for p in parts if isinstance(p, ast.Name)], given)
            case ((ast.Tuple(elts=parts) | ast.List(elts=parts)), ast.Call() as call):
                results = self.call(call, line, [p.id for p in parts if isinstance(p, ast.Name)])
                self.bind_results(parts, results)
            case ast.Name(id=name), _:
                self.bind(name, value, line)

    def bind(self, name: str, value: ast.expr, line: int) -> None:
        match value:
            case ast.Name(id=source) if is_symbol(name):
                self.scope.set_symbol(name, source)
            case ast.Subscript(value=ast.Name(id=whole), slice=ast.Constant(value=int() as index)) if is_symbol(name):
                self.scope.set_symbol_of(name, whole, index)
            case ast.Name() | ast.Subscript():
                self.scope.alias(name, value, reused=self.lines[line - 1].rstrip().endswith("# reuse"))
            case ast.List(elts=parts):
                self.scope.lists[name] = parts
            case ast.Call(func=ast.Attribute(value=ast.Name(id=whole), attr="size" | "stride" as attribute), args=[]):
                self.scope.set_sizes(name, whole, attribute)
            case ast.Call(func=func) if dotted(func).rpartition(".")[2] == "copy_if_misaligned":
                return
            case ast.Call(func=func) as call:
                tensor = self.scope.allocation(name, dotted(func).rpartition(".")[2], call)
                if tensor is not None:
                    self.scope.set_tensor(tensor)
                    return
                self.bind_results([ast.Name(name)], self.call(call, line, [name]), whole=name)
            case ast.BinOp() | ast.UnaryOp() | ast.Constant():
                self.scope.set_size(name, value)

    def bind_results(self, targets: list[ast.expr], results: list[ast.expr] | None, whole: str = "") -> None:
        if results is None:
            return
        if whole:
            self.scope.lists[whole] = results
            return
        for target, result in zip(targets, results, strict=False):
            held = self.scope.resolve(result)
            if isinstance(target, ast.Name) and isinstance(held, Tensor):
                self.scope.names[target.id] = held

    def call(self, call: ast.Call, line: int, results: list[str] | None) -> list[ast.expr] | None:
        """Record what a call launches. For a function of this module, returns the expressions that it returns."""
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
        elif method in _ASSERTIONS:
            self.asserted(call)
        return None

    def asserted(self, call: ast.Call) -> None:
        """Sizes and strides of a tensor, or from torch 2.14 on of several, each argument a tuple."""
        match call.args:
            case [ast.Name(id=name), size, stride, *_]:
                self.scope.asserted(name, size, stride)
            case [ast.Tuple(elts=tensors), ast.Tuple(elts=sizes), ast.Tuple(elts=strides), *_]:
                for tensor, size, stride in zip(tensors, sizes, strides, strict=False):
                    if isinstance(tensor, ast.Name):
                        self.scope.asserted(tensor.id, size, stride)

    def subgraph(self, func: ast.expr, path: str) -> ast.FunctionDef | None:
        match func:
            case ast.Subscript(value=ast.Attribute(attr="partitions"), slice=ast.Constant(value=int() as index)):
                return self.functions.get(f"partition_{index}")
        return self.functions.get(path) if path not in _ENTRY_POINTS else None

    def list_argument(self, call: ast.Call) -> list[ast.expr]:
        match call.args:
            case [ast.Name(id=name)]:
                return self.scope.lists.get(name, [])
            case [ast.List(elts=parts)]:
                return parts
        return list(call.args)

    def extern(self, path: str, call: ast.Call, line: int, results: list[str] | None) -> None:
        arguments = [self.scope.resolve(argument) for argument in call.args]
        outs = [k.value for k in call.keywords if k.arg in ("out", "out0", "out1", "outs")]
        held = [
            self.scope.resolve(o)
            for out in outs
            for o in (out.elts if isinstance(out, (ast.Tuple, ast.List)) else [out])
        ]
        written = [tensor for tensor in held if isinstance(tensor, Tensor)]
        written += [self.scope.result(name) for name in results or ()]
        named = path.startswith(("torch.ops.", "aten.", "extern_kernels.", "inductor_ops.", "_quantized."))
        if not named and not any(isinstance(a, Tensor) for a in [*arguments, *written]):
            return
        self.add(operator_name(path), None, call, line, tuple(written))

    def add(self, name: str, kernel: str | None, call: ast.Call, line: int, out: tuple[Tensor, ...]) -> None:
        flat: list[ast.expr] = []
        for argument in (*call.args, *(k.value for k in call.keywords if k.arg not in ("out", "stream", "grid"))):
            flat.extend(argument.elts if isinstance(argument, (ast.List, ast.Tuple)) else [argument])
        resolved = tuple(self.scope.argument(argument) for argument in flat)
        aten, origins = comments.above(self.lines, line)
        self.module.calls.append(Call(name, kernel, resolved, out, line, aten, origins, self.branch))
