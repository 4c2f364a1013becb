"""Quantizations that stand in a graph as one operation: ours, and vLLM's as `auto_functionalized` leaves it."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from normquant.compile.find.graph import (
    Unsupported,
    arguments,
    dtype,
    first_arg,
    is_call,
    keeps_order,
    overload_name,
    peel,
    value,
)
from normquant.compile.find.quants import Quant, axes_of
from normquant.spec import FP8_MAX, TMA_ALIGN, Layout, QuantSpec

VLLM_QUANT = "_C::per_token_group_fp8_quant"
VLLM_PACKED = "_C::per_token_group_fp8_quant_packed"
DEEPGEMM = "vllm::fp8_gemm_nt_op"
VLLM_SCALE_FLOOR = 1e-10  # of `per_token_group_fp8_quant` with scale_ue8m0, beside the floor of amax


def is_group_quant(node: Node) -> bool:
    return is_call(node, torch.ops.normquant.group_quant.default)


def is_quant(node: Node) -> bool:
    """Whether node is a quantization in one operation."""
    return is_group_quant(node) or functionalized(node) in (VLLM_QUANT, VLLM_PACKED)


def read(node: Node, k: int) -> Quant:
    """The quantization that node makes of rows of k values. Raises Unsupported when the kernels do not support it."""
    return read_group_quant(node, k) if is_group_quant(node) else read_vllm_quant(node, k)


def source(node: Node) -> Node:
    """What the operation quantizes."""
    return first_arg(node) if is_group_quant(node) else node.kwargs["input"]  # type: ignore[return-value]


def quantized(node: Node) -> Node:
    """The same, after views are taken off."""
    return peel(source(node), keeps_order)


def read_group_quant(node: Node, k: int) -> Quant:
    """Our own op: everything is in its spec."""
    source: Any = arguments(node)[0]
    spec = QuantSpec.decode(str(arguments(node)[1]))
    if value(source).shape[1] != k:
        raise Unsupported(f"the quantization reads rows of {value(source).shape[1]} values, the norm makes rows of {k}")
    y = quantized(node)
    return Quant(y, _output(node, 0), _output(node, 1), None, axes_of(y, k, spec.group), spec, _path(node, source, y))


def read_vllm_quant(node: Node, k: int) -> Quant:
    """vLLM's CUDA ops: amax floor eps, s = amax / 448 truly divided, y / s; row, column-major or TMA-aligned scales."""
    args: dict[str, Any] = dict(node.kwargs)
    source, group = args["input"], args["group_size"]
    if (args["fp8_min"], args["fp8_max"]) != (-FP8_MAX, FP8_MAX):
        raise Unsupported(f"the data is clamped to {args['fp8_min']}, {args['fp8_max']}; the kernels clamp to +-448")
    packed = functionalized(node) == VLLM_PACKED
    data, scale = mutated(node, "output_q"), mutated(node, "output_s_packed" if packed else "output_s")
    like = data[1]
    if dtype(like) != torch.float8_e4m3fn:
        raise Unsupported(f"the data is {str(dtype(like)).removeprefix('torch.')}; the kernels make float8_e4m3fn")
    if value(source).shape[-1] != k:
        raise Unsupported(
            f"the quantization reads rows of {value(source).shape[-1]} values, the norm makes rows of {k}"
        )
    ue8m0 = packed or bool(args["scale_ue8m0"])
    try:
        spec = QuantSpec(
            group=group,
            scale="ue8m0_packed" if packed else "ue8m0" if ue8m0 else "fp32",
            layout="col_tma" if packed else layout_of(value(scale[1])),
            floor=args["eps"],
            scale_floor=VLLM_SCALE_FLOOR if ue8m0 else 0.0,
            scale_by="divide",
            nan="ignore" if ue8m0 else "propagate",  # as specs.VLLM_UE8M0 and specs.VLLM
        )
    except ValueError as error:
        raise Unsupported(str(error)) from None
    y = quantized(node)
    return Quant(y, data[0], scale[0], None, axes_of(y, k, group), spec, _path(node, source, y))


def layout_of(scale: torch.Tensor) -> Layout:
    """The layout of a scale [..., M, G] from its strides."""
    rows, groups = scale.shape[-2:]
    return "row" if isinstance(groups, int) and groups == 1 else layout_of_strides(rows, *scale.stride()[-2:])


def layout_of_strides(rows: Any, stride_m: Any, stride_g: Any) -> Layout:
    """The layout of scales of so many rows; symbolic rows are tried with several values."""
    if isinstance(rows, int) and rows == 1:  # the stride of the rows says nothing
        return "col_tma" if isinstance(stride_g, int) and stride_g == TMA_ALIGN else "row"
    if not (isinstance(stride_m, int) and stride_m == 1):
        return "row"
    if _equal_for_all_rows(stride_g, rows, lambda m: m):
        return "col"
    if _equal_for_all_rows(stride_g, rows, lambda m: -(-m // TMA_ALIGN) * TMA_ALIGN):
        return "col_tma"
    return "row"


def _equal_for_all_rows(stride: Any, rows: Any, expected: Any) -> bool:
    if isinstance(rows, int):
        return isinstance(stride, int) and stride == expected(rows)
    if isinstance(stride, int):
        return False
    size, step = rows.node.expr, stride.node.expr
    symbols = sorted(size.free_symbols | step.free_symbols, key=str)
    for trial in range(1, 10):
        values = {symbol: trial + i for i, symbol in enumerate(symbols)}
        if int(step.subs(values)) != expected(int(size.subs(values))):
            return False
    return True


def _output(node: Node, index: int) -> Node | None:
    found = [user for user in node.users if is_call(user, operator.getitem) and arguments(user)[1] == index]
    return found[0] if found else None


def _path(node: Node, source: Node, y: Node) -> frozenset[Node]:
    inner = {node}
    while source is not y:
        inner.add(source)
        source = arguments(source)[0]
    return frozenset(inner)


def functionalized(node: Node) -> str:
    """Name of the operation that an auto_functionalized node calls, "" for any other node."""
    if getattr(node.target, "__name__", "") not in ("auto_functionalized", "auto_functionalized_v2"):
        return ""
    return overload_name(arguments(node)[0]) if arguments(node) else ""


def called(node: Node) -> str:
    """`namespace::op` that a node calls, itself or through auto_functionalized."""
    return functionalized(node) or overload_name(node.target)


def mutated(node: Node, name: str) -> tuple[Node | None, Node]:
    """The node that holds an output after the call, and the tensor that was given for it."""
    mutable = [
        a.name for a in arguments(node)[0]._schema.arguments if a.alias_info is not None and a.alias_info.is_write
    ]
    given: Any = node.kwargs.get(name)
    if given is not None:  # auto_functionalized: (result, *mutated arguments)
        return _output(node, 1 + mutable.index(name)), given
    index: Any = node.kwargs.get(f"_{name}_base_index")
    bases: Any = node.kwargs.get("_all_bases")
    if (
        index is None
        or bases is None
        or any(key.startswith(f"_{name}_") and key != f"_{name}_base_index" for key in node.kwargs)
    ):
        raise Unsupported(f"the op writes {name} through a view of another tensor")
    out = _output(node, 1 + index)
    return out, bases[index]
