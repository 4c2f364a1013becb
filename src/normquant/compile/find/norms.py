"""RMSNorm, recognised from its value backwards: which tensor, weight, epsilon and roundings made it.

    h    = x, or x + residual
    rstd = rsqrt(mean(h * h) + eps)
    y    = h * rstd * (weight + weight_offset)

Every product and rounding is looked at in its own dtype, since the fused kernel has to do the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch.fx import Node

from normquant.compile.find.duplicates import Values
from normquant.compile.find.graph import (
    NotFound,
    Unsupported,
    arguments,
    aten,
    dtype,
    first_arg,
    is_call,
    is_cast,
    is_expand,
    is_narrowing,
    is_tensor,
    is_widening,
    keeps_order,
    number,
    op_name,
    peel,
    rows_are_even,
    same_shape,
    same_size,
    value,
)
from normquant.compile.find.root_mean_square import (
    ADDS,
    dtype_name,
    is_rstd,
    is_square_root,
    normalization,
    normalized_by,
    step_in,
)
from normquant.spec import ACTIVATION_DTYPES, Rounding, Sum


@dataclass(frozen=True)
class Addition:
    """h = x + residual. `stored` are the nodes that hold h in the activation dtype, none where nobody reads it."""

    x: Node
    residual: Node
    sum: Sum
    stored: tuple[Node, ...]


@dataclass(frozen=True)
class Norm:
    """One RMSNorm of a graph.

    y: its value as the quantization reads it, [..., K]; bf16 or fp16, or fp32 where it was not rounded.
    x: what is normalized, [..., K] in `dtype`; None where the graph has only the unrounded sum of `addition`.
    eps: a number, or the 0-dim input of the graph that holds it.
    inner: the nodes between x (or the unrounded sum) and y that serve nothing but y.
    again: the nodes that hold x, or the sum, once more.
    """

    y: Node
    x: Node | None
    addition: Addition | None
    weight: Node
    weight_offset: float
    eps: float | Node
    rounding: Rounding
    dtype: torch.dtype
    k: int
    inner: frozenset[Node]
    again: frozenset[Node] = frozenset()

    @property
    def sources(self) -> tuple[Node, ...]:
        """What the norm reads: x, or where that exists only as an unrounded sum, its addends."""
        if self.x is not None:
            return (self.x,)
        assert self.addition is not None
        return self.addition.x, self.addition.residual


def read_decomposed(y: Node, values: Values) -> Norm:
    """The norm in aten operations whose value is y.

    Raises NotFound when y is no RMSNorm and Unsupported when it is one that the kernels do not support.
    """
    inner: set[Node] = set()
    product = step_in(y, inner, keeps_order, is_narrowing)
    _refuse_division(product)
    if not is_call(product, aten.mul.Tensor):
        raise NotFound
    normalized, scale = _operands(product)
    n = peel(normalized, keeps_order, is_cast)
    rounded_n = _rounds(normalized, n)
    step_in(normalized, inner, keeps_order, is_cast)
    found = normalization(n, inner, values)
    shape = value(found.h).shape
    trailing = tuple(shape[len(shape) - found.dims :])
    k = static_int("K", prod(trailing))
    weight, offset = _weight(scale, trailing)
    x, addition = source(found.h, k, inner)
    activation = dtype(addition.x if addition is not None else found.h if x is None else x)
    rounded_y = dtype(y) in ACTIVATION_DTYPES
    check_roundings(inner, activation)
    inner.discard(y)
    rounding = _rounding(rounded_n, rounded_y)
    made_of = (weight, offset, found.eps, rounding, activation, k)
    return Norm(y, x, addition, *made_of, frozenset(inner), found.again)


def _rounds(node: Node, end: Node) -> bool:
    """Whether a value is rounded on the way from end to node. Raises Unsupported for any other dtype."""
    rounded = False
    while node is not end:
        if dtype(node) not in (*ACTIVATION_DTYPES, torch.float32):
            raise Unsupported(f"the norm is rounded to {dtype_name(dtype(node))}")
        rounded |= is_narrowing(node)
        node = first_arg(node)
    return rounded


def _operands(product: Node) -> tuple[Node, Node]:
    """The normalized operand and the weight operand of y's product."""
    a, b = arguments(product)[:2]
    if not (is_tensor(a) and is_tensor(b)):
        raise NotFound
    for normalized, scale in ((a, b), (b, a)):
        n = peel(normalized, keeps_order, is_cast)
        root = normalized_by(n)
        if root is not None:
            if not same_shape(value(root[0]).shape, value(n).shape):
                raise Unsupported("the weight is multiplied with rstd first; the kernels multiply x with rstd first")
            if is_rstd(scale):
                raise Unsupported("what was normalized is multiplied with another rstd, not with a weight")
            return normalized, scale
        _refuse_division(n)
    for factor in (a, b):
        if is_rstd(factor):
            raise Unsupported(
                "the norm has no weight, or its weight is multiplied with x or rstd before they are with each other"
            )
        other = peel(factor, keeps_order, is_cast)
        if is_call(other, aten.mul.Tensor) and any(is_rstd(arg) for arg in arguments(other)):
            raise Unsupported("rstd is multiplied with a number first; the kernels multiply x with rstd first")
    raise NotFound


def _refuse_division(n: Node) -> None:
    if is_call(n, aten.div.Tensor) and is_square_root(arguments(n)[1]):
        raise Unsupported("the norm divides by a square root; the kernels multiply by rsqrt, which gives other bits")


def _weight(scale: Node, trailing: tuple) -> tuple[Node, float]:
    """The weight of K values and what is added to it in fp32."""
    scale = peel(scale, is_expand)
    shape = tuple(value(scale).shape)
    while len(shape) > len(trailing) and isinstance(shape[0], int) and shape[0] == 1:
        shape = shape[1:]
    made_by = peel(scale, keeps_order, is_cast)
    if made_by.op == "call_function" and len(shape) > 1 and same_size(shape[-1], 1) and not same_shape(shape, trailing):
        factor = f"{op_name(made_by)} of shape {tuple(value(scale).shape)}"
        raise Unsupported(f"what was normalized is multiplied with one value per row, {factor}, not with a weight")
    if not same_shape(shape, trailing):
        raise Unsupported(f"the weight has shape {tuple(value(scale).shape)}; the kernels take one value per column")
    node, offset = weight_and_offset(scale)
    if dtype(node) not in (*ACTIVATION_DTYPES, torch.float32):
        raise Unsupported(f"the weight is {dtype_name(dtype(node))}; the kernels take bfloat16, float16 and float32")
    return node, offset


def weight_and_offset(scale: Node) -> tuple[Node, float]:
    """A factor as a weight and the constant that is added to it in fp32, as in Gemma's norms; 0.0 where none is."""
    node, offset = peel(scale, keeps_order, is_widening), 0.0
    if is_call(node, *ADDS) and dtype(node) == torch.float32 and number(node.kwargs.get("alpha", 1)) == 1:
        constants = [number(term) for term in arguments(node)[:2]]
        found = [c for c in constants if c is not None]
        if len(found) == 1:
            offset = found[0]
            node = peel(arguments(node)[constants.index(None)], keeps_order, is_widening)
    return node, offset


def source(h: Node, k: int, inner: set[Node]) -> tuple[Node | None, Addition | None]:
    """What the norm reads: x, and where x is a sum, its addends."""
    node = _first_with_even_rows(h, k)
    if dtype(node) in ACTIVATION_DTYPES:
        return node, _rounded_addition(node)
    if dtype(node) == torch.float32 and is_call(node, *ADDS):
        addends = _addends(node)
        if addends is not None:
            inner |= {node, *_views_of(node)}
            stored = [user for user in node.users if is_narrowing(user) and dtype(user) == dtype(addends[0])]
            return None, Addition(*addends, "fp32", tuple(stored))
    raise Unsupported(
        f"the norm reads {dtype_name(dtype(node))} ({op_name(node)}); the kernels read bfloat16 and float16"
    )


def _first_with_even_rows(h: Node, k: int) -> Node:
    """What h is a view or copy of, as far up as the rows of k values are evenly spaced: where the model made them so by
    a copy, that is what the norm reads."""
    chain = [h]
    while keeps_order(chain[-1]) or is_widening(chain[-1]):
        chain.append(first_arg(chain[-1]))
    even = [node for node in chain if dtype(node) in ACTIVATION_DTYPES and rows_are_even(value(node), k)]
    return even[-1] if even else chain[-1]


def _views_of(node: Node) -> set[Node]:
    """All views of a value, and views of those."""
    found: set[Node] = set()
    pending = [node]
    while pending:
        views = [user for user in pending.pop().users if keeps_order(user)]
        found.update(views)
        pending += views
    return found


def _rounded_addition(x: Node) -> Addition | None:
    """x as a sum that is rounded to the activation dtype: a bf16 add, or an fp32 add and a cast."""
    total = first_arg(x) if is_narrowing(x) else x
    if not is_call(total, aten.add.Tensor) or (total is not x and len(total.users) > 1):
        return None
    addends = _addends(total)
    if addends is None or dtype(addends[0]) != dtype(x):
        return None
    return Addition(*addends, "rounded", (x,))


def _addends(total: Node) -> tuple[Node, Node] | None:
    """Two tensors of one activation dtype and shape whose sum, computed in fp32, is total."""
    a, b = arguments(total)[:2]
    if not (is_tensor(a) and is_tensor(b)) or number(total.kwargs.get("alpha", 1)) != 1:
        return None
    a, b = peel(a, is_widening), peel(b, is_widening)
    if dtype(a) != dtype(b) or dtype(a) not in ACTIVATION_DTYPES:
        return None
    return (
        (a, b)
        if same_shape(value(a).shape, value(b).shape) and same_shape(value(a).shape, value(total).shape)
        else None
    )


def _rounding(inner: bool, outer: bool) -> Rounding:
    if inner:
        return "twice" if outer else "inner"
    return "once" if outer else "none"


def check_roundings(inner: set[Node], activation: torch.dtype) -> None:
    for node in inner:
        if is_tensor(node) and dtype(node) in ACTIVATION_DTYPES and dtype(node) != activation:
            raise Unsupported(f"the norm of a {dtype_name(activation)} tensor is rounded to {dtype_name(dtype(node))}")


def static_int(what: str, size: object) -> int:
    if not isinstance(size, int):
        raise Unsupported(f"{what} is symbolic ({size}); the kernels need it as a constant")
    return size
