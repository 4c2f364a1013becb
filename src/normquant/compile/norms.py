"""RMSNorm, recognised from its value backwards: which tensor, weight, epsilon and roundings made it.

    h    = x, or x + residual
    rstd = rsqrt(mean(h * h) + eps)
    y    = h * rstd * (weight + weight_offset)

Every product and rounding is looked at in its own dtype, since the fused kernel has to do the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch.fx import Node

from normquant.compile.graph import (
    NotFound,
    Unsupported,
    arguments,
    aten,
    dtype,
    first_arg,
    is_call,
    is_cast,
    is_narrowing,
    is_tensor,
    is_widening,
    keeps_order,
    number,
    op_name,
    peel,
    same_shape,
    same_size,
    value,
)
from normquant.spec import ACTIVATION_DTYPES, Rounding, Sum

ADDS = (aten.add.Tensor, aten.add.Scalar)


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
    inner: the nodes between x (or the unrounded sum) and y that are good for nothing but y.
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

    @property
    def sources(self) -> tuple[Node, ...]:
        """What the norm reads: x, or where that exists only as an unrounded sum, its addends."""
        if self.x is not None:
            return (self.x,)
        assert self.addition is not None
        return self.addition.x, self.addition.residual


def read_decomposed(y: Node) -> Norm:
    """The norm in aten operations whose value is y.

    Raises NotFound when y is no RMSNorm and Unsupported when it is one that the kernels do not have.
    """
    inner: set[Node] = set()
    product = step_in(y, inner, keeps_order, is_narrowing)
    if not is_call(product, aten.mul.Tensor):
        raise NotFound
    normalized, scale = _operands(product)
    n = peel(normalized, keeps_order, is_cast)
    rounded_n = _rounds(normalized, n)
    step_in(normalized, inner, keeps_order, is_cast)
    h, eps, dims = _normalization(n, inner)
    shape = value(h).shape
    trailing = tuple(shape[len(shape) - dims :])
    k = static_int("K", prod(trailing))
    weight, offset = _weight(scale, k, trailing)
    x, addition = source(h, inner)
    activation = dtype(addition.x if addition is not None else h if x is None else x)
    rounded_y = dtype(y) in ACTIVATION_DTYPES
    check_roundings({*inner, y}, activation)
    inner.discard(y)
    return Norm(y, x, addition, weight, offset, eps, _rounding(rounded_n, rounded_y), activation, k, frozenset(inner))


def _rounds(node: Node, end: Node) -> bool:
    """Whether a value is rounded on the way from end to node. Raises Unsupported for any other dtype."""
    rounded = False
    while node is not end:
        if dtype(node) not in (*ACTIVATION_DTYPES, torch.float32):
            raise Unsupported(f"the norm is rounded to {_name(dtype(node))}")
        rounded |= is_narrowing(node)
        node = first_arg(node)
    return rounded


def step_in(node: Node, inner: set[Node], *tests: Callable[[Node], bool]) -> Node:
    """`peel`, adding what is passed to `inner`."""
    end = peel(node, *tests)
    while node is not end:
        inner.add(node)
        node = first_arg(node)
    inner.add(end)
    return end


def _operands(product: Node) -> tuple[Node, Node]:
    """The normalized operand and the weight operand of y's product."""
    a, b = arguments(product)[:2]
    if not (is_tensor(a) and is_tensor(b)):
        raise NotFound
    for normalized, scale in ((a, b), (b, a)):
        n = peel(normalized, keeps_order, is_cast)
        if _root(n) is not None:
            return normalized, scale
        if is_call(n, aten.div.Tensor) and _is_square_root(arguments(n)[1]):
            raise Unsupported("the norm divides by a square root; the kernels multiply by rsqrt")
    for x, factor in ((a, b), (b, a)):
        if _is_rstd(factor) and is_tensor(x):
            raise Unsupported(
                "the norm has no weight, or its weight is multiplied with x or rstd before they are with each other"
            )
        other = peel(factor, keeps_order, is_cast)
        if is_call(other, aten.mul.Tensor) and any(_is_rstd(arg) for arg in arguments(other)):
            raise Unsupported("the weight is multiplied with rstd first; the kernels multiply x with rstd first")
    raise NotFound


def _is_rstd(arg: object) -> bool:
    if not is_tensor(arg):
        return False
    node = peel(arg, keeps_order, is_cast)
    if is_call(node, aten.pow.Tensor_Scalar):
        return number(arguments(node)[1]) == -0.5
    if is_call(node, aten.reciprocal.default):
        return _is_square_root(arguments(node)[0])
    return is_call(node, aten.rsqrt.default)


def _is_square_root(arg: object) -> bool:
    if not is_tensor(arg):
        return False
    node = peel(arg, keeps_order, is_cast)
    return is_call(node, aten.sqrt.default) or (
        is_call(node, aten.pow.Tensor_Scalar) and number(arguments(node)[1]) == 0.5
    )


def _root(n: Node) -> tuple[Node, Node] | None:
    """(h, rstd) of n = h * rstd."""
    if is_call(n, aten.mul.Tensor):
        for h, rstd in (arguments(n), arguments(n)[::-1]):
            if _is_rstd(rstd) and is_tensor(h):
                return h, rstd
    return None


def _normalization(n: Node, inner: set[Node]) -> tuple[Node, float | Node, int]:
    """h, eps and the number of reduced trailing dimensions of n = h * rsqrt(mean(h * h) + eps)."""
    root = _root(n)
    if root is None:
        raise NotFound
    if dtype(n) != torch.float32:
        raise Unsupported(f"the norm is computed in {_name(dtype(n))}; the kernels compute it in float32")
    h, rstd_use = root
    rstd = step_in(rstd_use, inner, keeps_order)
    if is_cast(rstd):
        raise Unsupported(f"rstd is rounded to {_name(dtype(rstd))}")
    if is_call(rstd, aten.reciprocal.default):
        raise Unsupported("the norm takes the reciprocal of a square root; the kernels take rsqrt")
    variance = step_in(first_arg(rstd), inner, keeps_order)
    if not is_call(variance, *ADDS) or number(variance.kwargs.get("alpha", 1)) != 1:
        raise Unsupported(f"rsqrt of {op_name(variance)}, not of a mean plus epsilon")
    terms = list(arguments(variance)[:2])
    constants = [_epsilon(term) for term in terms]
    if constants == [None, None]:
        raise Unsupported("epsilon is computed in the graph")
    eps = next(c for c in constants if c is not None)
    mean = next(t for t, c in zip(terms, constants, strict=True) if c is None)
    square, dims = _mean(step_in(mean, inner, keeps_order), inner)
    _check_square(square, h, inner)
    _check_rows(value(rstd_use), value(h), dims)
    return h, eps, dims


def _epsilon(term: object) -> float | Node | None:
    """A number, or an input of the graph that is one on the CPU."""
    if isinstance(term, Node):
        source = peel(term, keeps_order, is_cast)
        if source.op == "placeholder" and is_tensor(source) and value(source).dim() == 0:
            return source if value(source).device.type == "cpu" else None
    return number(term)


def _mean(mean: Node, inner: set[Node]) -> tuple[Node, int]:
    """The squares, and over how many trailing dimensions they are averaged; a sum divided by K is a mean."""
    count = None
    if is_call(mean, aten.div.Tensor, aten.div.Scalar):
        count = number(arguments(mean)[1])
        mean = step_in(first_arg(mean), inner, keeps_order)
    if not is_call(mean, aten.sum.dim_IntList if count is not None else aten.mean.dim):
        raise Unsupported(f"rsqrt of {op_name(mean)}, not of a mean of squares")
    if dtype(mean) != torch.float32:
        raise Unsupported(f"the mean of squares is {_name(dtype(mean))}; the kernels compute it in float32")
    squares = first_arg(mean)
    shape = value(squares).shape
    dims = sorted(d % len(shape) for d in arguments(mean)[1])
    if not dims or dims != list(range(len(shape) - len(dims), len(shape))):
        raise Unsupported("the norm does not run over the last dimensions")
    if count is not None and not same_size(prod(shape[dims[0] :]), int(count)):
        raise Unsupported("the sum of squares is not divided by the number of values")
    return squares, len(dims)


def _check_square(square: Node, h: Node, inner: set[Node]) -> None:
    square = step_in(square, inner, keeps_order)
    if is_call(square, aten.pow.Tensor_Scalar) and number(arguments(square)[1]) == 2:
        roots = [arguments(square)[0]]
    elif is_call(square, aten.mul.Tensor):
        roots = list(arguments(square)[:2])
    else:
        raise Unsupported(f"the mean is taken of {op_name(square)}, not of squares")
    if dtype(square) != torch.float32:
        raise Unsupported(f"the squares are {_name(dtype(square))}; the kernels compute them in float32")
    for root in roots:
        if not is_tensor(root) or not _same_values(root, h):
            raise Unsupported("the squares are of another tensor than the one that is normalized")


def _same_values(a: Node, b: Node) -> bool:
    return same_shape(value(a).shape, value(b).shape) and (
        peel(a, keeps_order, is_widening) is peel(b, keeps_order, is_widening)
    )


def _check_rows(rstd: torch.Tensor, h: torch.Tensor, dims: int) -> None:
    """rstd must meet h row by row: [..., 1] against [..., K]."""
    rows = tuple(h.shape[: h.dim() - dims])
    shape = (1,) * (h.dim() - rstd.dim()) + tuple(rstd.shape)
    if not same_shape(shape, rows + (1,) * dims):
        raise Unsupported(f"rstd has shape {tuple(rstd.shape)} beside x of shape {tuple(h.shape)}")


def _weight(scale: Node, k: int, trailing: tuple) -> tuple[Node, float]:
    """The weight of K values and what is added to it in fp32."""
    shape = tuple(value(scale).shape)
    while len(shape) > len(trailing) and isinstance(shape[0], int) and shape[0] == 1:
        shape = shape[1:]
    if not same_shape(shape, trailing):
        raise Unsupported(f"the weight has shape {tuple(value(scale).shape)}; the kernels take one value per column")
    node, offset = peel(scale, keeps_order, is_widening), 0.0
    if is_call(node, *ADDS) and dtype(node) == torch.float32 and number(node.kwargs.get("alpha", 1)) == 1:
        constants = [number(term) for term in arguments(node)[:2]]
        found = [c for c in constants if c is not None]
        if len(found) == 1:
            offset = found[0]
            node = peel(arguments(node)[constants.index(None)], keeps_order, is_widening)
    if dtype(node) not in (*ACTIVATION_DTYPES, torch.float32):
        raise Unsupported(f"the weight is {_name(dtype(node))}; the kernels take bfloat16, float16 and float32")
    return node, offset


def source(h: Node, inner: set[Node]) -> tuple[Node | None, Addition | None]:
    """What the norm reads: x, and where x is a sum, its addends."""
    node = peel(h, keeps_order, is_widening)
    if dtype(node) in ACTIVATION_DTYPES:
        return node, _rounded_addition(node)
    if dtype(node) == torch.float32 and is_call(node, *ADDS):
        addends = _addends(node)
        if addends is not None:
            inner |= {node, *_views_of(node)}
            stored = [user for user in node.users if is_narrowing(user) and dtype(user) == dtype(addends[0])]
            return None, Addition(*addends, "fp32", tuple(stored))
    raise Unsupported(f"the norm reads {_name(dtype(node))} ({op_name(node)}); the kernels read bfloat16 and float16")


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
            raise Unsupported(f"the norm of a {_name(activation)} tensor is rounded to {_name(dtype(node))}")


def static_int(what: str, size: object) -> int:
    if not isinstance(size, int):
        raise Unsupported(f"{what} is symbolic ({size}); the kernels need it as a constant")
    return size


def _name(d: torch.dtype) -> str:
    return str(d).removeprefix("torch.")
