"""Reads the text of a Triton kernel: its parameters, and what it loads and stores. Nothing is executed."""

import ast
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from normquant.audit.size_expressions import UnknownSize, evaluate
from normquant.audit.source import symbolic_values
from normquant.audit.source.symbolic_values import UNKNOWN, MemoryOp, MemoryOps, StoredValue, SymbolicValue

_LOOP = re.compile(r"^(reduced_)?([xyz]|r\d*_?)index(_\d+)?$")  # reduced: one per group of a nested reduction
_LOOP_MASK = re.compile(r"^(([xyz]|r\d*_?)mask(_\d+)?|reduced_([xyz]|r\d*_?)index_mask)$")
_POINTER_DTYPES = {
    "bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64", "i1": "bool", "u1": "bool",
    "i8": "int8", "u8": "uint8", "i16": "int16", "u16": "uint16", "i32": "int32", "u32": "uint32", "i64": "int64",
    "u64": "uint64", "fp8e4nv": "float8_e4m3fn", "fp8e5": "float8_e5m2", "fp8e4b8": "float8_e4m3fnuz",
    "fp8e5b16": "float8_e5m2fnuz",
}  # fmt: skip
_VALUE_DTYPES = {
    "float8e4nv": "float8_e4m3fn", "float8e5": "float8_e5m2", "int1": "bool", "float8e4b8": "float8_e4m3fnuz",
    "float8e5b16": "float8_e5m2fnuz",
}  # fmt: skip
_SAME_DATA = frozenset({"broadcast_to", "expand_dims", "reshape", "view"})  # calls that return their first argument


class NotAKernel(ValueError):
    """Text that is not a generated Triton kernel."""


@dataclass(frozen=True)
class KernelCode:
    """A kernel as written. `pointers` maps its pointer parameters to dtypes, in the order of the signature."""

    name: str
    kind: str
    parameters: tuple[str, ...]
    pointers: dict[str, str]
    mutated: tuple[str, ...]
    source: str
    generated: bool  # by Inductor, so that its names for loops and masks can be relied on


@functools.lru_cache(maxsize=64)  # a parsed kernel takes a hundred times its text: only recent ones are kept
def _function(source: str) -> ast.FunctionDef:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise NotAKernel(f"not Python: {error}") from None
    for statement in reversed(tree.body):
        if isinstance(statement, ast.FunctionDef) and statement.decorator_list:
            return statement
    raise NotAKernel("no decorated function")


def read_kernel(source: str) -> KernelCode:
    """The kernel in `source`; NotAKernel when it holds none."""
    function = _function(source)
    heuristic = next((d for d in function.decorator_list if isinstance(d, ast.Call)), None)
    keywords = {k.arg: k.value for k in heuristic.keywords} if heuristic else {}
    kind = heuristic.func.attr if heuristic and isinstance(heuristic.func, ast.Attribute) else "user"
    signature = _literal(_entry(keywords.get("triton_meta"), "signature"))
    mutated = _literal(_entry(keywords.get("inductor_meta"), "mutated_arg_names"))
    types = signature if isinstance(signature, dict) else {}
    pointers = {
        str(name): _POINTER_DTYPES.get(str(kind_of)[1:], str(kind_of)[1:])
        for name, kind_of in types.items()
        if str(kind_of).startswith("*")
    }
    return KernelCode(
        name=function.name,
        kind="user" if kind == "user_autotune" else kind,
        parameters=tuple(argument.arg for argument in function.args.args),
        pointers=pointers,
        mutated=tuple(str(name) for name in mutated) if isinstance(mutated, (list, tuple)) else (),
        source=source,
        generated=kind not in ("user", "user_autotune", "template"),
    )


def _entry(node: ast.expr | None, key: str) -> ast.expr | None:
    if not isinstance(node, ast.Dict):
        return None
    for name, value in zip(node.keys, node.values, strict=True):
        if isinstance(name, ast.Constant) and name.value == key:
            return value
    return None


def _literal(node: ast.expr | None) -> object:
    try:
        return ast.literal_eval(node) if node is not None else None
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None


def read_memory_ops(code: KernelCode, numbers: Mapping[str, int]) -> MemoryOps:
    """What the kernel loads and stores when its integer parameters have the values `numbers`."""
    reader = _KernelReader(code, numbers)
    reader.block(_function(code.source).body)
    return reader.ops


class _KernelReader:
    """Reads a kernel's body once, in order; a loop's body counts as one pass."""

    def __init__(self, code: KernelCode, numbers: Mapping[str, int]) -> None:
        self.code = code
        self.numbers = dict(numbers)
        self.names: dict[str, SymbolicValue] = {name: SymbolicValue(pointer=name, linear=()) for name in code.pointers}
        self.names.update({name: symbolic_values.number(value) for name, value in numbers.items()})
        self.ops = MemoryOps()
        self.section = 0
        self.sections = 0
        self.member: str | None = None

    def block(self, statements: list[ast.stmt]) -> None:
        for position, statement in enumerate(statements):
            members = _members_of_one_body(statement) if self.member is None else []
            for member in members:
                self.branch(member.test, [*member.body, *statements[position + 1 :]])
            if members:
                return
            self.statement(statement)

    def statement(self, statement: ast.stmt) -> None:
        match statement:
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=value)
                | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value)
            ):
                self.assign(name, value)
            case ast.Assign(targets=targets, value=value):
                self.value(value)
                names = (part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name))
                self.names.update(dict.fromkeys(names, UNKNOWN))
            case ast.AugAssign(target=ast.Name(id=name), op=op, value=value):
                self.names[name] = self.binary(op, self.names.get(name, UNKNOWN), self.value(value))
            case ast.Expr(value=value):
                self.value(value)
            case ast.For(body=body) | ast.While(body=body):
                self.loop(body)
            case ast.If(test=test, body=body, orelse=orelse):
                self.branch(test, body)
                self.block(orelse)
            case ast.With(body=body):
                self.block(body)

    def loop(self, body: list[ast.stmt]) -> None:
        outer, self.sections = self.section, self.sections + 1
        self.section = self.sections
        self.block(body)
        self.section = outer

    def branch(self, test: ast.expr, body: list[ast.stmt]) -> None:
        """Read a branch; one that is a kernel of several in a launch has its own loop sizes."""
        outer, self.member = self.member, _combo_member(test)
        if self.member is not None:
            for name in [name for name in self.names if name.endswith("numel")]:
                del self.names[name]
        self.block(body)
        self.member = outer

    def assign(self, name: str, node: ast.expr) -> None:
        counted = _LOOP.match(name)
        if counted and self.code.generated:
            whole = self.counter(counted.group(2), node)
            self.names[name] = self.per_group(counted.group(2), whole) if counted.group(1) else whole
        elif _LOOP_MASK.match(name) and self.code.generated:
            self.names[name] = SymbolicValue(bounds=())
        elif name.endswith("numel"):
            self.names[name] = self.size(node)
        else:
            self.names[name] = self.value(node)
        known = self.names[name].number
        if known is not None:
            self.numbers[name] = known

    def counter(self, loop: str, node: ast.expr) -> SymbolicValue:
        if isinstance(node, ast.Name) or loop == "r":  # rindex: the loops of a reduction combined
            return self.value(node)
        for name in (f"{loop}numel", f"{loop}numel_{self.member}"):  # numbered where they are symbolic
            size = self.names.get(name, UNKNOWN).number
            if size is not None:
                return symbolic_values.loop(loop, size)
        raise UnknownSize(f"{loop}numel")

    def per_group(self, loop: str, whole: SymbolicValue) -> SymbolicValue:
        """The counter of a loop's groups, over which a nested reduction reduces."""
        name = f"nested_{loop.removesuffix('_').upper()}_LOCAL_REDUCTION_SIZE"
        if self.names.get(name, UNKNOWN).number is None:
            raise UnknownSize(name)
        return symbolic_values.divide(whole, self.names[name])

    def size(self, node: ast.expr) -> SymbolicValue:
        try:
            return symbolic_values.number(evaluate(node, self.numbers))
        except UnknownSize:
            return UNKNOWN

    def value(self, node: ast.expr) -> SymbolicValue:
        match node:
            case ast.Constant(value=bool()):
                return UNKNOWN
            case ast.Constant(value=int() as number):
                return symbolic_values.number(number)
            case ast.Name(id=name):
                return self.names.get(name, UNKNOWN)
            case ast.BinOp(left=left, op=op, right=right):
                return self.binary(op, self.value(left), self.value(right))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return symbolic_values.multiply(self.value(operand), symbolic_values.number(-1))
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                return self.condition(op, self.value(left), self.value(right))
            case ast.Subscript(value=inner):
                return self.value(inner)
            case ast.Call():
                return self.call(node)
        return symbolic_values.combined(
            self.value(part) for part in ast.iter_child_nodes(node) if isinstance(part, ast.expr)
        )

    def binary(self, op: ast.operator, left: SymbolicValue, right: SymbolicValue) -> SymbolicValue:
        if left.pointer or right.pointer:
            return _moved(left, right) if isinstance(op, ast.Add) else replace(UNKNOWN, pointer=left.pointer)
        match op:
            case ast.Add():
                return symbolic_values.add(left, right)
            case ast.Sub():
                return symbolic_values.add(left, right, -1)
            case ast.Mult():
                return symbolic_values.multiply(left, right)
            case ast.FloorDiv():
                return symbolic_values.divide(left, right)
            case ast.Mod():
                return symbolic_values.modulo(left, right)
            case ast.BitAnd():
                return symbolic_values.both(left, right)
        return symbolic_values.combined((left, right))

    def condition(self, op: ast.cmpop, left: SymbolicValue, right: SymbolicValue) -> SymbolicValue:
        match op:
            case ast.Lt() | ast.LtE():
                return symbolic_values.compare(left, right, False, isinstance(op, ast.LtE))
            case ast.GtE() | ast.Gt():
                return symbolic_values.compare(left, right, True, isinstance(op, ast.Gt))
        return SymbolicValue(bounds=(), opaque=True)

    def call(self, node: ast.Call) -> SymbolicValue:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = self.value(node.func.value) if isinstance(node.func, ast.Attribute) else UNKNOWN
        if name == "load" or name.startswith("atomic_") or name == "store":
            return self.access(name, owner, node)
        if name == "to" and isinstance(node.func, ast.Attribute):
            return self.converted(owner, node)
        if name == "full" and len(node.args) >= 2:
            return self.value(node.args[1])
        arguments = [self.value(argument) for argument in (*node.args, *(k.value for k in node.keywords))]
        if name in _SAME_DATA:
            return owner if owner != UNKNOWN else (arguments[0] if arguments else UNKNOWN)
        pointed = next((a.pointer for a in (owner, *arguments) if a.pointer), None)
        if pointed is not None:  # a block pointer or a descriptor: the index is not followed
            return SymbolicValue(pointer=pointed)
        return symbolic_values.combined((owner, *arguments))

    def converted(self, owner: SymbolicValue, node: ast.Call) -> SymbolicValue:
        of_load = isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Call)
        target = _dtype(node.args[0]) if node.args else ""
        if owner.loaded is not None and not of_load:  # directly on the load it is Inductor's own widening
            return replace(owner, casts=(*owner.casts, target))
        return owner

    def access(self, name: str, owner: SymbolicValue, node: ast.Call) -> SymbolicValue:
        arguments = list(node.args)
        mask = next((k.value for k in node.keywords if k.arg == "mask"), None)
        at = owner if owner.pointer else self.value(arguments.pop(0)) if arguments else UNKNOWN
        if at.pointer is None:
            return UNKNOWN
        stored = UNKNOWN
        if name != "load" and arguments:
            stored = self.value(arguments.pop() if owner.pointer else arguments.pop(0))
        if mask is None and arguments and not owner.pointer:
            mask = arguments[0]
        op = self.memory_op(at, mask)
        if name == "load":
            self.ops.loads.append(op)
            return SymbolicValue(digits=op.index.digits, loaded=op, indirect=True)
        self.ops.stores.append(StoredValue(op, stored, atomic=name != "store"))
        return UNKNOWN

    def memory_op(self, at: SymbolicValue, mask: ast.expr | None) -> MemoryOp:
        held = self.value(mask) if mask is not None else SymbolicValue(bounds=())
        trivial = mask is None or (isinstance(mask, ast.Constant) and mask.value is None)
        masked = not trivial and (held.bounds is None or held.opaque or bool(held.bounds))
        order = len(self.ops.loads) + len(self.ops.stores)
        index = replace(at, pointer=None)
        return MemoryOp(str(at.pointer), index, held.bounds or (), masked, self.section, order)


def _members_of_one_body(statement: ast.stmt) -> list[ast.If]:
    """The branches that choose pointers and sizes for the code that follows.

    From torch 2.14 on, kernels of a foreach that do the same to different tensors share one body.
    """
    found: list[ast.If] = []
    while isinstance(statement, ast.If) and _combo_member(statement.test) is not None:
        found.append(statement)
        statement = statement.orelse[0] if statement.orelse else ast.Pass()
    names = {n.id for part in found[:1] for node in part.body for n in ast.walk(node) if isinstance(n, ast.Name)}
    return found if any(name.startswith("foreach_arg") for name in names) else []


def _combo_member(test: ast.expr) -> str | None:
    """The number of the kernel that `pid < num_xblocks_2` or `pid % 3 == 2` chooses."""
    match test:
        case ast.Compare(left=ast.Name(id="pid"), comparators=[ast.Name(id=limit)]):
            return limit.rpartition("_")[2]
        case ast.Compare(
            left=ast.BinOp(left=ast.Name(id="pid"), op=ast.Mod()), comparators=[ast.Constant(value=int() as n)]
        ):
            return str(n)
    return None


def _moved(left: SymbolicValue, right: SymbolicValue) -> SymbolicValue:
    """A pointer plus an index."""
    base, offset = (left, right) if left.pointer else (right, left)
    bare = replace(base, pointer=None)
    return replace(symbolic_values.add(bare, offset), pointer=base.pointer)


def _dtype(node: ast.expr) -> str:
    name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
    return _VALUE_DTYPES.get(name, name)
