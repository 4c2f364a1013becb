"""The root mean square of a norm, recognised from n = h * rsqrt(mean(h * h) + eps) backwards."""

from __future__ import annotations

from collections.abc import Callable
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

ADDS = (aten.add.Tensor, aten.add.Scalar)


def step_in(node: Node, inner: set[Node], *tests: Callable[[Node], bool]) -> Node:
    """`peel`, adding what is passed to `inner`."""
    end = peel(node, *tests)
    while node is not end:
        inner.add(node)
        node = first_arg(node)
    inner.add(end)
    return end


def dtype_name(d: torch.dtype) -> str:
    return str(d).removeprefix("torch.")


def is_rstd(arg: object) -> bool:
    if not is_tensor(arg):
        return False
    node = peel(arg, keeps_order, is_cast, is_expand)
    if is_call(node, aten.pow.Tensor_Scalar):
        return number(arguments(node)[1]) == -0.5
    if is_call(node, aten.reciprocal.default):
        return is_square_root(arguments(node)[0])
    if is_call(node, aten.mul.Tensor) and number(arguments(node)[1]) == 1:  # torch's 1 / sqrt(v)
        return is_rstd(arguments(node)[0])
    return is_call(node, aten.rsqrt.default)


def is_square_root(arg: object) -> bool:
    if not is_tensor(arg):
        return False
    node = peel(arg, keeps_order, is_cast, is_expand)
    return is_call(node, aten.sqrt.default) or (
        is_call(node, aten.pow.Tensor_Scalar) and number(arguments(node)[1]) == 0.5
    )


def normalized_by(n: Node) -> tuple[Node, Node] | None:
    """(h, rstd) of n = h * rstd."""
    if is_call(n, aten.mul.Tensor):
        for h, rstd in (arguments(n), arguments(n)[::-1]):
            if is_rstd(rstd) and is_tensor(h):
                return h, rstd
    return None


@dataclass(frozen=True)
class Normalization:
    """n = h * rsqrt(mean(h * h) + eps). dims: how many trailing dimensions are averaged over. again: the nodes that
    hold what h is a view of once more, where the squares are of a second copy of it."""

    h: Node
    eps: float | Node
    dims: int
    again: frozenset[Node]


def normalization(n: Node, inner: set[Node], values: Values) -> Normalization:
    """The normalization whose value is n."""
    root = normalized_by(n)
    if root is None:
        raise NotFound
    if dtype(n) != torch.float32:
        raise Unsupported(f"the norm is computed in {dtype_name(dtype(n))}; the kernels compute it in float32")
    h, rstd_use = root
    rstd_use = step_in(rstd_use, inner, is_expand)  # h's shape is what it meets anyway
    rstd = step_in(rstd_use, inner, keeps_order)
    if is_cast(rstd):
        raise Unsupported(f"rstd is rounded to {dtype_name(dtype(rstd))}")
    if is_call(rstd, aten.reciprocal.default, aten.mul.Tensor):
        raise Unsupported(
            "the norm takes the reciprocal of a square root; the kernels take rsqrt, which gives other bits"
        )
    variance = step_in(first_arg(rstd), inner, keeps_order)
    mean, eps = _mean_and_epsilon(variance)
    square, dims = _mean(step_in(mean, inner, keeps_order), inner)
    again = _square_roots(square, h, inner, values)
    _check_rows(value(rstd_use), value(h), dims)
    return Normalization(h, eps, dims, again)


def _mean_and_epsilon(variance: Node) -> tuple[Node, float | Node]:
    """The terms of mean + eps. From torch 2.14 on Inductor drops an eps of 0 before the pass sees the graph."""
    if not is_call(variance, *ADDS):
        return variance, 0.0
    if number(variance.kwargs.get("alpha", 1)) != 1:
        raise Unsupported("epsilon is added with a factor")
    terms = list(arguments(variance)[:2])
    constants = [_epsilon(term) for term in terms]
    if constants == [None, None]:
        raise Unsupported("epsilon is computed in the graph")
    eps = next(c for c in constants if c is not None)
    return next(t for t, c in zip(terms, constants, strict=True) if c is None), eps


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
        raise Unsupported(f"the mean of squares is {dtype_name(dtype(mean))}; the kernels compute it in float32")
    squares = first_arg(mean)
    shape = value(squares).shape
    dims = sorted(d % len(shape) for d in arguments(mean)[1])
    if not dims or dims != list(range(len(shape) - len(dims), len(shape))):
        raise Unsupported("the norm does not run over the last dimensions")
    if count is not None and not same_size(prod(shape[dims[0] :]), int(count)):
        raise Unsupported("the sum of squares is not divided by the number of values")
    return squares, len(dims)


def _square_roots(square: Node, h: Node, inner: set[Node], values: Values) -> frozenset[Node]:
    """The nodes, other than that of h, of whose values `square` holds the squares. They have to hold h."""
    square = step_in(square, inner, keeps_order)
    if is_call(square, aten.pow.Tensor_Scalar) and number(arguments(square)[1]) == 2:
        roots = [arguments(square)[0]]
    elif is_call(square, aten.mul.Tensor):
        roots = list(arguments(square)[:2])
    else:
        raise Unsupported(f"the mean is taken of {op_name(square)}, not of squares")
    if dtype(square) != torch.float32:
        raise Unsupported(f"the squares are {dtype_name(dtype(square))}; the kernels compute them in float32")
    base = _base(h)
    for root in roots:
        same = is_tensor(root) and same_shape(value(root).shape, value(h).shape)
        if not same or not values.same(_base(root), base):
            squared, normalized = _described(root), _described(h)
            raise Unsupported(f"the squares are of {squared}, another tensor than the normalized one, {normalized}")
    return frozenset(map(_base, roots)) - {base}


def _base(node: Node) -> Node:
    return peel(node, keeps_order, is_widening)


def _described(arg: object) -> str:
    """Where a value comes from, and its shape."""
    if not is_tensor(arg):
        return str(arg)
    base = _base(arg)
    return f"{op_name(base)} ({base.name}) {tuple(value(arg).shape)}"


def _check_rows(rstd: torch.Tensor, h: torch.Tensor, dims: int) -> None:
    """rstd must meet h row by row: [..., 1] against [..., K]."""
    rows = tuple(h.shape[: h.dim() - dims])
    shape = (1,) * (h.dim() - rstd.dim()) + tuple(rstd.shape)
    if not same_shape(shape, rows + (1,) * dims):
        raise Unsupported(f"rstd has shape {tuple(rstd.shape)} beside x of shape {tuple(h.shape)}")
