"""Norms that stand in a graph as one operation: torch's own, and vLLM's IR before vLLM lowers it."""

from __future__ import annotations

import operator
from math import prod
from typing import Any

import torch
from torch.fx import Node

from normquant.compile.find.duplicates import Values
from normquant.compile.find.graph import (
    NotFound,
    Unsupported,
    arguments,
    aten,
    dtype,
    is_call,
    is_narrowing,
    is_tensor,
    keeps_order,
    number,
    op_name,
    value,
)
from normquant.compile.find.norms import (
    Addition,
    Norm,
    check_roundings,
    read_decomposed,
    source,
    static_int,
    weight_and_offset,
)
from normquant.compile.find.root_mean_square import step_in
from normquant.spec import ACTIVATION_DTYPES, Rounding

Scaling = tuple[Node, float, Rounding]  # weight, what is added to it, how often the norm is rounded

VLLM_NORM, VLLM_ADD_NORM = "vllm_ir.rms_norm", "vllm_ir.fused_add_rms_norm"
NAMES = ("aten._fused_rms_norm", VLLM_NORM, VLLM_ADD_NORM)


def is_norm_op(node: Node) -> bool:
    """Whether node is a norm in one operation."""
    return node.op == "call_function" and not is_call(node, operator.getitem) and op_name(node) in NAMES


def read_norm(y: Node, values: Values) -> Norm:
    """The norm whose value is y. Raises NotFound when there is none, Unsupported when the kernels do not support it."""
    for reader in (_vllm_norm, _vllm_add_norm, _fused_rms_norm):
        try:
            return reader(y)
        except NotFound:
            continue
    return read_decomposed(y, values)


def _fused_rms_norm(y: Node) -> Norm:
    """`aten._fused_rms_norm`, which multiplies by the weight in fp32 and rounds once."""
    inner: set[Node] = set()
    op = _output_of(step_in(y, inner, keeps_order, is_narrowing), 0)
    if not is_call(op, aten._fused_rms_norm.default):
        raise NotFound
    inner.add(op)
    h, shape, weight, eps = arguments(op)
    if not isinstance(weight, Node):
        raise Unsupported("the norm has no weight")
    epsilon = torch.finfo(torch.float32).eps if eps is None else number(eps)
    if epsilon is None:
        raise Unsupported("epsilon is computed in the graph")
    k = static_int("K", prod(shape))
    x, addition = source(h, k, inner)
    if x is None or dtype(h) not in ACTIVATION_DTYPES:
        raise Unsupported("aten._fused_rms_norm reads float32; the kernels read bfloat16 and float16")
    check_roundings({*inner, y} - {op}, dtype(x))
    inner.discard(y)
    return Norm(y, x, addition, weight, 0.0, epsilon, "once", dtype(x), k, frozenset(inner))


def _vllm_norm(y: Node) -> Norm:
    """`vllm_ir.rms_norm(x, weight, epsilon, variance_size)`."""
    inner: set[Node] = set()
    op = step_in(y, inner, keeps_order, is_narrowing)
    if op_name(op) != VLLM_NORM or is_call(op, operator.getitem):
        raise NotFound
    h, scaling, eps = _vllm_arguments(op, 1)
    inner.add(op)
    inner.discard(y)
    k = _width(h)
    x, addition = source(h, k, inner)
    if x is None:
        raise Unsupported("vllm_ir.rms_norm reads float32; the kernels read bfloat16 and float16")
    weight, offset, rounding = scaling
    return Norm(y, x, addition, weight, offset, eps, rounding, dtype(x), k, frozenset(inner))


def _vllm_add_norm(y: Node) -> Norm:
    """`vllm_ir.fused_add_rms_norm(x, residual, weight, epsilon, variance_size)`: the norm of the unrounded sum."""
    inner: set[Node] = set()
    op = _output_of(step_in(y, inner, keeps_order, is_narrowing), 0)
    if op is None or op_name(op) != VLLM_ADD_NORM:
        raise NotFound
    x, (weight, offset, rounding), eps = _vllm_arguments(op, 2)
    residual: Any = arguments(op)[1]
    inner.add(op)
    inner.discard(y)
    stored = tuple(user for user in op.users if is_call(user, operator.getitem) and arguments(user)[1] == 1)
    addition = Addition(x, residual, "fp32", stored)
    return Norm(y, None, addition, weight, offset, eps, rounding, dtype(x), _width(x), frozenset(inner))


def _vllm_arguments(op: Node, at: int) -> tuple[Node, Scaling, float]:
    """x, weight with offset and rounding, and epsilon of a vLLM norm; `at` is where the weight stands.

    n is rounded to the weight's dtype, and n * w to x's. So with a weight like x both are rounded, and with an fp32 one
    (Gemma's norms compute it as w.float() + 1) the product alone.
    """
    x, weight, epsilon = arguments(op)[0], arguments(op)[at], number(arguments(op)[at + 1])
    variance_size = arguments(op)[at + 2] if len(arguments(op)) > at + 2 else op.kwargs.get("variance_size")
    if variance_size is not None:
        raise Unsupported("the norm's variance is of a part of the row")
    if not (is_tensor(x) and is_tensor(weight)):
        raise Unsupported("the norm has no weight")
    if dtype(x) not in ACTIVATION_DTYPES or dtype(weight) not in (dtype(x), torch.float32):
        raise Unsupported(f"the norm of {dtype(x)} has a weight of {dtype(weight)}")
    if epsilon is None:
        raise Unsupported("epsilon is computed in the graph")
    if dtype(weight) == dtype(x):
        return x, (weight, 0.0, "twice"), epsilon
    return x, (*weight_and_offset(weight), "once"), epsilon


def _output_of(node: Node, index: int) -> Any:
    """The operation whose output `index` a node is, None when it is no such output."""
    return arguments(node)[0] if is_call(node, operator.getitem) and arguments(node)[1] == index else None


def _width(x: Node) -> int:
    return static_int("K", value(x).shape[-1])
