"""What the names in a generated function stand for while it is read: tensors, sizes, lists."""

import ast
import re

from normquant.audit.source import comments
from normquant.audit.source.generated_module import GeneratedModule, Size, Tensor

_HEAVIEST = 400  # nodes of a size expression; a larger one stays a name without a value
_ALLOCATES = re.compile(r"^_?empty_strided\w*$")


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an attribute access; '' for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    return ".".join([node.id, *reversed(parts)])


class Scope:
    """The names in scope. What becomes known of tensors is kept in the module."""

    def __init__(self, module: GeneratedModule, lines: list[str]) -> None:
        self.module = module
        self.lines = lines
        self.names: dict[str, Tensor | ast.expr] = {}
        self.lists: dict[str, list[ast.expr]] = {}
        self.weights: dict[str, int] = {}
        self.examples: dict[str, Tensor] = {}  # inputs as the module's own benchmark makes them, with sizes as numbers
        self.shapes_in_comments = dict(comments.shapes(lines))

    def set_tensor(self, tensor: Tensor) -> None:
        self.names[tensor.buffer] = self.module.tensors[tensor.buffer] = tensor

    def result(self, name: str) -> Tensor:
        """Name the result of a call; its shape is known from comments, or from an assertion that follows."""
        dtype, size, stride = self.shapes_in_comments.get(name, ("", None, None))
        tensor = Tensor(name, name, dtype, size, stride)
        self.set_tensor(tensor)
        return tensor

    def set_symbol(self, name: str, source: str) -> None:
        """Name a size that is passed as an input: `s72 = arg1_1`."""
        if source in self.module.hints:
            self.module.hints[name] = self.module.hints[source]
        elif source in self.module.inputs:
            self.module.inputs.remove(source)
            self.module.tensors.pop(source, None)
        self.names[name] = self.names[source] = ast.Name(name)

    def set_sizes(self, name: str, tensor: str, attribute: str) -> None:
        """Name all sizes of an input, or all its strides: `arg1_1_size = arg1_1.size()`."""
        example = self.examples.get(tensor)
        if example is not None:
            self.lists[name] = list((example.size if attribute == "size" else example.stride) or ())

    def set_symbol_of(self, name: str, whole: str, index: int) -> None:
        """Name one of them: `s22 = arg1_1_size[0]`. Its value is that of the example input."""
        sizes = self.lists.get(whole, [])
        if index < len(sizes) and isinstance(example := sizes[index], ast.Constant) and isinstance(example.value, int):
            self.module.hints[name] = example.value
        self.names[name] = ast.Name(name)

    def parameters(self, names: list[str], given: list[Tensor | ast.expr] | None) -> None:
        """Name the arguments of a function: `given` for a subgraph, else the program's inputs."""
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
            self.examples[name] = example
            tensor = Tensor(name, name, example.dtype or dtype, size or example.size, stride or example.stride)
            self.set_tensor(tensor)

    def set_size(self, name: str, value: ast.expr) -> None:
        """Name a size that is computed from others; it is expanded wherever it is used, unless it is too large."""
        weight = sum(self.weights.get(part.id, 1) if isinstance(part, ast.Name) else 1 for part in ast.walk(value))
        self.weights[name] = weight
        self.names[name] = self.substituted(value) if weight <= _HEAVIEST else ast.Name(name)

    def alias(self, name: str, value: ast.expr, reused: bool) -> None:
        """Give memory a new name: `buf2 = buf1`, `buf1 = buf0[0]`."""
        held = self.resolve(value)
        if not isinstance(held, Tensor):
            if isinstance(value, ast.Subscript):
                self.part(name, value)
            return
        if not reused:
            self.module.same_as[name] = held.buffer
        dtype, size, stride = self.shapes_in_comments.get(name, ("", None, None))
        if isinstance(value, ast.Subscript) and held.size is None:
            tensor = Tensor(name, name, dtype, size, stride)
            self.module.parts.setdefault(held.buffer, []).append(name)
        else:
            tensor = Tensor(name, held.storage, held.dtype, held.size, held.stride)
        self.set_tensor(tensor)

    def part(self, name: str, value: ast.Subscript) -> None:
        """Name one of several results of a call or a subgraph."""
        match value:
            case ast.Subscript(value=ast.Name(id=whole), slice=ast.Constant(value=int() as index)):
                parts = self.lists.get(whole, [])
                if index < len(parts) and isinstance(held := self.resolve(parts[index]), Tensor):
                    self.names[name] = held

    def allocation(self, name: str, maker: str, call: ast.Call) -> Tensor | None:
        """The tensor that a call of Inductor's allocates; None for any other call."""
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
        """`reinterpret_tensor(buf, size, stride, offset)`."""
        if len(call.args) < 3:
            return None
        base = self.resolve(call.args[0])
        if not isinstance(base, Tensor):
            return None
        size, stride = self.size(call.args[1]), self.size(call.args[2])
        return Tensor(base.buffer, base.storage, base.dtype, size, stride, is_view=True)

    def size(self, node: ast.expr) -> Size | None:
        elements = comments.elements(node)
        return tuple(self.substituted(element) for element in elements) if elements is not None else None

    def substituted(self, node: ast.expr) -> ast.expr:
        """A size expression with the names of computed sizes expanded."""
        if isinstance(node, ast.Name):
            held = self.names.get(node.id)
            return held if isinstance(held, ast.expr) else node
        if isinstance(node, ast.BinOp):
            return ast.BinOp(self.substituted(node.left), node.op, self.substituted(node.right))
        if isinstance(node, ast.UnaryOp):
            return ast.UnaryOp(node.op, self.substituted(node.operand))
        return node

    def resolve(self, node: ast.expr) -> Tensor | ast.expr:
        """The tensor that an expression names, or the expression."""
        match node:
            case ast.Name(id=name):
                return self.names.get(name, node)
            case ast.Subscript(value=ast.Name(id=name)):
                held = self.names.get(name)
                return held if isinstance(held, Tensor) else node
            case ast.Call(func=func) if dotted(func).endswith("reinterpret_tensor"):
                return self.view(node) or node
            case ast.Call(func=ast.Attribute(value=inner)) if not node.args:  # buf0.view(...), buf0.item()
                held = self.resolve(inner)
                return held if isinstance(held, Tensor) else node
        return node

    def asserted(self, name: str, size: ast.expr, stride: ast.expr) -> None:
        """`assert_size_stride(buf2, (64, 512), (512, 1))` gives the shape of a call's result."""
        held = self.names.get(name)
        if isinstance(held, Tensor):
            tensor = Tensor(held.buffer, held.storage, held.dtype, self.size(size), self.size(stride))
            self.names[name] = self.module.tensors[name] = tensor

    def argument(self, node: ast.expr) -> Tensor | ast.expr:
        """What is passed for an argument: a tensor, or an expression with sizes expanded."""
        held = self.resolve(node)
        return held if isinstance(held, Tensor) else self.substituted(held)
