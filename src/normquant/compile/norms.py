"""RMSNorm, recognised from its value backwards: which tensor, weight, epsilon and roundings made it.

    h    = x, or x + residual
    rstd = rsqrt(mean(h * h) + eps)
    y    = h * rstd * (weight + weight_offset)

Every product and rounding is looked at in its own dtype, since the fused kernel has to do the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch.fx import Node

from normquant.compile.graph import (
    NotFound,
    Unsupported,
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
    """h = x + residual. `stored` is h in the activation dtype where the graph has it; None: nobody reads it."""

    x: Node
    residual: Node
    sum: Sum
    stored: Node | None


@dataclass(frozen=True)
class Norm:
    """One RMSNorm of a graph.

    y: its value as the quantization reads it, [..., K]; bf16 or fp16, or fp32 where it was not rounded.
    x: what is normalized, [..., K] in `dtype`; None where only the unrounded sum of `addition` is.
    inner: the nodes between x (or the addends) and y that only compute y.
    """

    y: Node
    x: Node | None
    addition: Addition | None
    weight: Node
    weight_offset: float
    eps: float
    rounding: Rounding
    dtype: torch.dtype
    k: int
    inner: frozenset[Node]


Reader = Callable[[Node], Norm]
READERS: list[Reader] = []


def read_norm(y: Node) -> Norm:
    """The norm whose value is y. Raises NotFound when y is no RMSNorm and Unsupported when it is one of another kind."""
    for reader in READERS:
        try:
            return reader(y)
        except NotFound:
            continue
    raise NotFound


def _decomposed(y: Node) -> Norm:
    inner: set[Node] = {y}
    product = _step_in(y, inner, keeps_order, is_narrowing)
    if not is_call(product, aten.mul.Tensor):
        raise NotFound
    normalized, scale = _operands(product, inner)
    inner_rounding = dtype(normalized) in ACTIVATION_DTYPES
    n = _step_in(normalized, inner, keeps_order, is_widening, is_narrowing)
    h, eps, dims = _normalization(n, inner)
    shape = value(h).shape
    k = _int("K", prod(shape[len(shape) - dims :]))
    weight, offset = _weight(scale, k, shape[len(shape) - dims :], inner)
    x, addition = _source(h, inner)
    activation = dtype(x if addition is None else addition.x)  # type: ignore[arg-type]
    outer_rounding = dtype(product) in ACTIVATION_DTYPES or product is not _widest(y)
    rounding = _rounding(inner_rounding, outer_rounding)
    _check_roundings(inner, activation)
    return Norm(y, x, addition, weight, offset, eps, rounding, activation, k, frozenset(inner))


def _widest(y: Node) -> Node:
    return peel(y, keeps_order)


def _fused_op(y: Node) -> Norm:
    """`aten._fused_rms_norm`, which rounds once."""
    inner: set[Node] = {y}
    out = _step_in(y, inner, keeps_order)
    if out.target.__class__ is str or not out.args or not is_call(out.args[0], aten._fused_rms_norm.default):
        raise NotFound
    if out.args[1] != 0:
        raise NotFound
    op = first_arg(out)
    inner |= {out, op}
    h, shape, weight, eps = (*op.args, None, None)[:4]
    if not isinstance(weight, Node):
        raise Unsupported("the norm has no weight")
    k = _int("K", prod(shape))  # type: ignore[arg-type]
    if dtype(h) not in ACTIVATION_DTYPES:  # type: ignore[arg-type]
        raise Unsupported(f"the norm reads {_name(dtype(h))}; the kernels read bfloat16 and float16")  # type: ignore[arg-type]
    addition = _rounded_addition(h, set())  # type: ignore[arg-type]
    epsilon = torch.finfo(torch.float32).eps if eps is None else number(eps)
    if epsilon is None:
        raise Unsupported("epsilon is not a constant of the graph")
    return Norm(y, h, addition, weight, 0.0, epsilon, "once", dtype(out), k, frozenset(inner))  # type: ignore[arg-type]


READERS += [_decomposed, _fused_op]


def _step_in(node: Node, inner: set[Node], *tests: Callable[[Node], bool]) -> Node:
    """`peel`, adding what is passed to `inner`."""
    end = peel(node, *tests)
    while node is not end:
        inner.add(node)
        node = first_arg(node)
    inner.add(end)
    return end


def _operands(product: Node, inner: set[Node]) -> tuple[Node, Node]:
    """The normalized operand and the weight operand of y's product."""
    a, b = product.args[:2]
    if not (is_tensor(a) and is_tensor(b)):
        raise NotFound
    for normalized, scale in ((a, b), (b, a)):
        n = peel(normalized, keeps_order, is_cast)  # type: ignore[arg-type]
        if is_call(n, aten.mul.Tensor) and _root(n) is not None:
            return normalized, scale  # type: ignore[return-value]
        if is_call(n, aten.div.Tensor) and _root_of_division(n):
            raise Unsupported("the norm divides by a square root; the kernels multiply by rsqrt")
    for x, factor in ((a, b), (b, a)):
        other = peel(factor, keeps_order, is_cast)  # type: ignore[arg-type]
        if is_call(other, aten.mul.Tensor) and any(_is_rstd(arg) for arg in other.args):
            raise Unsupported("the weight is multiplied with rstd before x; the kernels multiply x with rstd first")
        if _is_rstd(factor) and _is_norm_input(x, factor):
            raise Unsupported("the norm has no weight")
    raise NotFound


def _is_norm_input(x: object, rstd: object) -> bool:
    return isinstance(x, Node) and isinstance(rstd, Node) and value(x).dim() == value(rstd).dim()


def _is_rstd(arg: object) -> bool:
    if not is_tensor(arg):
        return False
    node = peel(arg, keeps_order, is_cast, lambda n: is_call(n, aten.expand.default))  # type: ignore[arg-type]
    if is_call(node, aten.pow.Tensor_Scalar):
        return number(node.args[1]) == -0.5
    if is_call(node, aten.reciprocal.default):
        return is_call(node.args[0], aten.sqrt.default)
    return is_call(node, aten.rsqrt.default)


def _root(n: Node) -> tuple[Node, Node] | None:
    """(h, rstd) of n = h * rstd."""
    for h, rstd in (n.args[:2], n.args[1::-1]):
        if _is_rstd(rstd) and is_tensor(h):
            return h, rstd  # type: ignore[return-value]
    return None


def _root_of_division(n: Node) -> bool:
    divisor = n.args[1]
    return is_tensor(divisor) and is_call(peel(divisor, keeps_order, is_cast), aten.sqrt.default)  # type: ignore[arg-type]


def _normalization(n: Node, inner: set[Node]) -> tuple[Node, float, int]:
    """h, eps and the number of reduced trailing dimensions of n = h * rsqrt(mean(h * h) + eps)."""
    root = _root(n)
    if root is None:
        raise NotFound
    if dtype(n) != torch.float32:
        raise Unsupported(f"the norm is computed in {_name(dtype(n))}; the kernels compute it in float32")
    h, rstd_use = root
    rstd = _step_in(rstd_use, inner, keeps_order)
    if is_call(rstd, aten.reciprocal.default):
        raise Unsupported("the norm takes the reciprocal of a square root; the kernels take rsqrt")
    variance = _step_in(first_arg(rstd), inner, keeps_order)
    if not is_call(variance, *ADDS) or number(variance.kwargs.get("alpha", 1)) != 1:
        raise Unsupported(f"rsqrt of {op_name(variance)}, not of a mean plus epsilon")
    terms = list(variance.args[:2])
    constants = [number(term) for term in terms]
    if constants == [None, None]:
        raise Unsupported("epsilon is not a constant of the graph")
    eps = next(c for c in constants if c is not None)
    mean = next(t for t, c in zip(terms, constants, strict=True) if c is None)
    square, dims = _mean(_step_in(mean, inner, keeps_order), inner)  # type: ignore[arg-type]
    _check_square(square, h, inner)
    _check_rows(value(rstd_use), value(h), dims)
    return h, eps, dims


def _mean(mean: Node, inner: set[Node]) -> tuple[Node, int]:
    """The squares, and over how many trailing dimensions they are averaged; a sum divided by K is a mean."""
    count = None
    if is_call(mean, aten.div.Tensor, aten.div.Scalar):
        count = number(mean.args[1])
        mean = _step_in(first_arg(mean), inner, keeps_order)
    if not is_call(mean, aten.sum.dim_IntList if count is not None else aten.mean.dim):
        raise Unsupported(f"rsqrt of {op_name(mean)}, not of a mean of squares")
    if dtype(mean) != torch.float32:
        raise Unsupported(f"the mean of squares is {_name(dtype(mean))}; the kernels compute it in float32")
    squares = first_arg(mean)
    shape = value(squares).shape
    dims = sorted(d % len(shape) for d in mean.args[1])  # type: ignore[union-attr]
    if not dims or dims != list(range(len(shape) - len(dims), len(shape))):
        raise Unsupported("the norm does not run over the last dimensions")
    if count is not None and not same_size(prod(shape[dims[0] :]), int(count)):
        raise Unsupported("the sum of squares is not divided by the number of values")
    return squares, len(dims)


def _check_square(square: Node, h: Node, inner: set[Node]) -> None:
    square = _step_in(square, inner, keeps_order)
    if is_call(square, aten.pow.Tensor_Scalar) and number(square.args[1]) == 2:
        roots = [square.args[0]]
    elif is_call(square, aten.mul.Tensor):
        roots = list(square.args[:2])
    else:
        raise Unsupported(f"the mean is taken of {op_name(square)}, not of squares")
    if dtype(square) != torch.float32:
        raise Unsupported(f"the squares are {_name(dtype(square))}; the kernels compute them in float32")
    for root in roots:
        if not is_tensor(root) or not _same_values(root, h):  # type: ignore[arg-type]
            raise Unsupported("the squares are of another tensor than the one that is normalized")
        _step_in(root, inner, keeps_order, is_widening)  # type: ignore[arg-type]


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


def _weight(scale: Node, k: int, trailing: tuple, inner: set[Node]) -> tuple[Node, float]:
    """The weight [K] and what is added to it in fp32."""
    shape = tuple(value(scale).shape)
    while shape and len(shape) > len(trailing) and isinstance(shape[0], int) and shape[0] == 1:
        shape = shape[1:]
    if not same_shape(shape, trailing):
        raise Unsupported(f"the weight has shape {tuple(value(scale).shape)}; the kernels take one value per column")
    node, offset = _step_in(scale, inner, keeps_order, is_widening), 0.0
    if is_call(node, *ADDS) and dtype(node) == torch.float32 and number(node.kwargs.get("alpha", 1)) == 1:
        constants = [number(term) for term in node.args[:2]]
        found = [c for c in constants if c is not None]
        if len(found) == 1:
            offset = found[0]
            node = _step_in(node.args[constants.index(None)], inner, keeps_order, is_widening)  # type: ignore[arg-type]
    inner.discard(node)
    if prod(value(node).shape) != k:
        raise Unsupported(f"the weight has {tuple(value(node).shape)} values beside K = {k}")
    return node, offset


def _source(h: Node, inner: set[Node]) -> tuple[Node | None, Addition | None]:
    """What the norm reads: x, and where x is a sum, its addends."""
    node = _step_in(h, inner, keeps_order, is_widening)
    inner.discard(node)
    if dtype(node) in ACTIVATION_DTYPES:
        return node, _rounded_addition(node, inner)
    if dtype(node) == torch.float32 and is_call(node, *ADDS):
        addends = _addends(node)
        if addends is not None:
            stored = [user for user in node.users if is_narrowing(user) and dtype(user) == dtype(addends[0])]
            inner.add(node)
            return None, Addition(*addends, "fp32", stored[0] if stored else None)
    raise Unsupported(f"the norm reads {_name(dtype(node))} ({op_name(node)}); the kernels read bfloat16 and float16")


def _rounded_addition(x: Node, inner: set[Node]) -> Addition | None:
    """x as a sum that is rounded to the activation dtype: a bf16 add, or an fp32 add and a cast."""
    total = first_arg(x) if is_narrowing(x) else x
    if not is_call(total, aten.add.Tensor):
        return None
    addends = _addends(total)
    if addends is None or dtype(addends[0]) != dtype(x):
        return None
    return Addition(*addends, "rounded", x)


def _addends(total: Node) -> tuple[Node, Node] | None:
    """Two tensors of one activation dtype and shape whose sum, computed in fp32, is total."""
    a, b = total.args[:2]
    if not (is_tensor(a) and is_tensor(b)) or number(total.kwargs.get("alpha", 1)) != 1:
        return None
    a, b = peel(a, is_widening), peel(b, is_widening)  # type: ignore[arg-type]
    if dtype(a) != dtype(b) or dtype(a) not in ACTIVATION_DTYPES:
        return None
    return (a, b) if same_shape(value(a).shape, value(b).shape) and same_shape(value(a).shape, value(total).shape) else None


def _rounding(inner: bool, outer: bool) -> Rounding:
    if inner:
        return "twice" if outer else "inner"
    return "once" if outer else "none"


def _check_roundings(inner: set[Node], activation: torch.dtype) -> None:
    for node in inner:
        if is_tensor(node) and dtype(node) in ACTIVATION_DTYPES and dtype(node) != activation:
            raise Unsupported(f"the norm of a {_name(activation)} tensor is rounded to {_name(dtype(node))}")


def _int(what: str, size: object) -> int:
    if not isinstance(size, int):
        raise Unsupported(f"{what} is symbolic ({size}); the kernels need it as a constant")
    return size


def _name(d: torch.dtype) -> str:
    return str(d).removeprefix("torch.")


def inner_in_order(norm: Norm) -> Iterator[Node]:
    return (node for node in norm.y.graph.nodes if node in norm.inner)
