"""Reading FX nodes of an Inductor graph: what an operation is, what its values look like, which are constants."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch.fx import Graph, Node

aten = torch.ops.aten
prims = torch.ops.prims

RESHAPES = {aten.reshape.default, aten.view.default, aten._unsafe_view.default}
UNIT_DIMS = {aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default}
PERMUTES = {aten.permute.default, aten.t.default, aten.transpose.int}
SAME_VALUES = {aten.alias.default, aten.detach.default, aten.clone.default, aten.lift_fresh_copy.default}
CASTS = {prims.convert_element_type.default, aten._to_copy.default}
FP8_DTYPES = {
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
}  # float8_e8m0fnu, which holds powers of two, is a scale's


class Unsupported(Exception):
    """A norm or a quantization that was recognised and that the kernels do not support; the message says which part."""


class NotFound(Exception):
    """There is no norm here, or no group quantization; the message says what is there instead."""


def is_call(node: object, *targets: Any) -> TypeGuard[Node]:
    """Whether node calls one of the operations."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def value(node: Node) -> torch.Tensor:
    """The fake tensor that node makes; raises Unsupported where the graph carries none."""
    val = node.meta.get("val")
    if not isinstance(val, torch.Tensor):
        raise Unsupported(f"the graph carries no shape for {node.name}")
    return val


def is_tensor(node: object) -> TypeGuard[Node]:
    return isinstance(node, Node) and isinstance(node.meta.get("val"), torch.Tensor)


def dtype(node: Node) -> torch.dtype:
    return value(node).dtype


def op_name(node: Node) -> str:
    """`aten.mul`, `normquant.group_quant`, or what the node is when it calls nothing."""
    if node.op != "call_function":
        return node.op
    if node.target is operator.getitem and isinstance(node.args[0], Node):
        return op_name(node.args[0])
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._opname}"
    return getattr(target, "__name__", str(target))


def overload_name(target: object) -> str:
    """`namespace::op` of an operation that may not be registered in this process, "" for anything else."""
    return target._schema.name if isinstance(target, torch._ops.OpOverload) else ""


def arguments(node: Node) -> tuple[Any, ...]:
    """The positional arguments; what they are is for the caller to know."""
    return node.args


def first_arg(node: Node) -> Node:
    arg = node.args[0] if node.args else None
    if not isinstance(arg, Node):
        raise Unsupported(f"{op_name(node)} has no tensor as its first argument")
    return arg


def factors(product: Node) -> Iterator[tuple[Node, Node]]:
    """Both tensors of a product, in either order; nothing for any other node."""
    if is_call(product, aten.mul.Tensor) and all(map(is_tensor, arguments(product)[:2])):
        a, b = arguments(product)[:2]
        yield from ((a, b), (b, a))


def is_cast(node: object) -> TypeGuard[Node]:
    return is_call(node, *CASTS)


def is_widening(node: object) -> TypeGuard[Node]:
    """bf16 or fp16 to fp32: every value stays what it is."""
    return is_cast(node) and dtype(node) == torch.float32 and dtype(first_arg(node)).itemsize < 4


def is_narrowing(node: object) -> TypeGuard[Node]:
    """fp32 to bf16 or fp16: a rounding."""
    return is_cast(node) and dtype(node).itemsize == 2 and dtype(first_arg(node)) == torch.float32


def is_view(node: object) -> TypeGuard[Node]:
    """The same values in the same or in another order, no value more than once; copies count."""
    if is_call(node, *RESHAPES, *UNIT_DIMS, *PERMUTES, *SAME_VALUES):
        return True
    return is_cast(node) and dtype(node) == dtype(first_arg(node))


def is_alias(node: object) -> TypeGuard[Node]:
    """A view that may lie in the memory of its input."""
    return is_view(node) and not is_call(node, aten.clone.default)


def keeps_order(node: object) -> TypeGuard[Node]:
    """A view whose values, read row by row, come in the order of its input's."""
    return is_view(node) and not is_call(node, *PERMUTES)


def is_expand(node: object) -> TypeGuard[Node]:
    """The same values, some more than once."""
    return is_call(node, aten.expand.default)


def peel(node: Node, *tests: Any) -> Node:
    """The first node up the chain of first arguments for which none of the tests holds."""
    while any(test(node) for test in tests):
        node = first_arg(node)
    return node


def number(arg: object) -> float | None:
    """The value of an argument that is one number wherever it is used: a Python number or a constant tensor."""
    if isinstance(arg, (int, float)) and not isinstance(arg, bool):
        return float(arg)
    if not isinstance(arg, Node):
        return None
    node = peel(arg, is_view, is_cast, is_expand)
    if is_call(node, aten.full.default, aten.full_like.default):
        return number(node.args[1])
    if is_call(node, aten.scalar_tensor.default):
        return number(node.args[0])
    if node.op == "get_attr":
        constant = getattr(node.graph.owning_module, str(node.target), None)
        if isinstance(constant, torch.Tensor) and constant.numel() == 1 and type(constant) is torch.Tensor:
            return float(constant)
    return None


def is_python_number(arg: object) -> bool:
    return isinstance(arg, (int, float))


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes, which may be symbolic, are known to be equal; asks without adding a guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(a == b))


def same_shape(a: Iterable[Any], b: Iterable[Any]) -> bool:
    a, b = tuple(a), tuple(b)
    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b, strict=True))


def asks_shape(node: object, like: Node) -> bool:
    """Whether node asks for the shape of its argument, and `like` or a view of it has the same one."""
    if not is_call(node, aten.sym_size.int, aten.sym_numel.default):
        return False
    asked, shape = value(first_arg(node)), value(like).shape
    one_unknown = sum(not isinstance(size, int) for size in asked.shape) <= 1
    return same_shape(asked.shape, shape) or (one_unknown and same_size(asked.numel(), value(like).numel()))


def mutation_regions(graph: Graph) -> dict[Node, int]:
    """For each node, how many operations before it change a tensor in place: values may be moved inside one region."""
    from torch._inductor.pattern_matcher import is_mutation_op

    regions, region = {}, 0
    for node in graph.nodes:
        region += bool(is_mutation_op(node))
        regions[node] = region
    return regions


def rows_are_even(x: torch.Tensor, k: int) -> bool:
    """Whether x can be seen as [M, K] without a copy."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    stride: Any = None
    run: Any = 1
    sizes = [
        (size, step)
        for size, step in zip(x.shape, x.stride(), strict=True)
        if not (isinstance(size, int) and size == 1)
    ]
    for size, step in reversed(sizes):
        inside_row = stride is None and isinstance(run, int) and run < k
        if inside_row:
            if not statically_known_true(step == run):
                return False
            run = run * size
            continue
        if stride is not None and not statically_known_true(step == stride):
            return False
        stride = step * size
    return True


@dataclass(frozen=True)
class Columns:
    """`width` columns of `base`, from `start` on."""

    base: Node
    start: int
    width: int

    @property
    def end(self) -> int:
        return self.start + self.width


def columns(node: Node) -> Columns | None:
    """The columns that a node holds of the tensor that it is sliced from, through slices of slices.

    None for a node that is no such slice, or whose width is symbolic.
    """
    found = part(node)
    if found is None:
        return None
    (base, start), width = found, value(node).shape[-1]
    if not isinstance(width, int):
        return None
    outer = columns(base)
    return Columns(base, start, width) if outer is None else Columns(outer.base, outer.start + start, width)


def part(node: Node) -> tuple[Node, int] | None:
    """What a node is a slice of along the last dimension, and where it starts; None where it is none."""
    if is_call(node, operator.getitem):
        split, index = arguments(node)
        if is_call(split, aten.split.Tensor, aten.split_with_sizes.default) and _is_last(split, 2):
            sizes = arguments(split)[1]
            before = [sizes] * index if isinstance(sizes, int) else sizes[:index]
            return (first_arg(split), sum(before)) if all(isinstance(size, int) for size in before) else None
    if is_call(node, aten.slice.Tensor) and _is_last(node, 1) and len(arguments(node)) < 5:
        start = arguments(node)[2] if len(arguments(node)) > 2 else 0
        return (first_arg(node), start) if isinstance(start, int) and start >= 0 else None
    return None


def _is_last(node: Node, at: int) -> bool:
    """Whether the argument `at`, a dimension, is the last one of the tensor that a node reads."""
    dim = arguments(node)[at] if len(arguments(node)) > at else 0
    dims = value(first_arg(node)).dim()
    return isinstance(dim, int) and dim % dims == dims - 1
