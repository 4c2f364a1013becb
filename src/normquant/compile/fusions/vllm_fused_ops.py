"""Replace vLLM's own fused CUDA ops, where a model calls them or a pass of vLLM has put them into a graph.

    rms_norm_per_block_quant        norm and quantization; with a residual, x is added to it in place
    silu_and_mul_per_block_quant    silu(gate) * up and quantization

The arithmetic is that of the op: a power of two that vLLM dropped when it fused is not brought back, the report says
where one is asked for. What goes is the copy of the residual that an op takes which changes it, and the transposition
that DeepGEMM starts with where scales in columns are not aligned.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.fx import Graph, Node

from normquant.compile.edit.build import Builder, Rewrite, as_rows, call_in_place_of
from normquant.compile.find.graph import Unsupported, dtype, number, value
from normquant.compile.find.quant_ops import DEEPGEMM, functionalized, layout_of, mutated
from normquant.compile.fusions.acceptance import check_op, rows_of
from normquant.compile.fusions.candidate import (
    Candidate,
    Findings,
    rejected,
    rows_seen,
    site_name,
    source_line,
)
from normquant.spec import QuantSpec
from normquant.specs import VLLM_FUSED, VLLM_FUSED_SILU

NORM_QUANT = "_C::rms_norm_per_block_quant"
SILU_QUANT = "_C::silu_and_mul_per_block_quant"
LOST = ", which gave its reader other scales than the powers of two that it asks for"


@dataclass(frozen=True)
class FusedOp:
    """One call. x: [..., K], for the product of halves [..., 2K]. k: K. results: the nodes that hold data, scale and
    with a residual the sum; None where nobody reads it. arguments: weight and epsilon of a norm, () without a norm.
    aligns: whether the scales come out TMA-aligned where they were not."""

    x: Node
    residual: Node | None
    k: int
    results: tuple[Node | None, ...]
    arguments: tuple[Any, ...]
    spec: QuantSpec
    aligns: bool = False

    @property
    def name(self) -> str:
        """Of our op."""
        if not self.arguments:
            return "silu_mul_quant"
        return "rms_norm_quant" if self.residual is None else "add_rms_norm_quant"


def find(graph: Graph) -> Findings:
    """Every call of vLLM's fused ops."""
    for anchor in [node for node in graph.nodes if functionalized(node) in (NORM_QUANT, SILU_QUANT)]:
        name, where = site_name(anchor), source_line(anchor)
        try:
            found = _read_norm(anchor) if functionalized(anchor) == NORM_QUANT else _read_silu(anchor)
            _check_inputs(found)
        except Unsupported as reason:
            yield rejected(name, where, f"{functionalized(anchor)}: {reason}")
            continue
        yield _candidate(anchor, found, name, where)


def _candidate(anchor: Node, found: FusedOp, name: str, where: str) -> Candidate:
    x = value(found.x)
    rows = x.numel() // x.shape[-1]
    return Candidate(
        name,
        where,
        found.name,
        x,
        rows,
        found.k,
        found.spec,
        fuse=partial(_replace, anchor, found),
        traffic=_saved(found, rows_seen(rows)),
        opaque_norm=bool(found.arguments),
    )


def _read_norm(anchor: Node) -> FusedOp:
    """The call of NORM_QUANT. Raises Unsupported where our op does not support it."""
    args: dict[str, Any] = dict(anchor.kwargs)
    spec, data, scale = _read_quant(anchor, VLLM_FUSED, "result", "scale", value(args["input"]).shape[-1])
    weight, epsilon = args["weight"], number(args["epsilon"])
    if epsilon is None:
        raise Unsupported("epsilon is computed in the graph")
    stored, residual = (None, None) if args.get("residual") is None else mutated(anchor, "residual")
    results = (data, scale) if residual is None else (data, scale, stored)
    k = value(args["input"]).shape[-1]
    return FusedOp(args["input"], residual, k, results, (weight, epsilon), spec)


def _read_silu(anchor: Node) -> FusedOp:
    """The call of SILU_QUANT. Raises Unsupported where our op does not support it."""
    x: Any = anchor.kwargs["input"]
    k = value(x).shape[-1] // 2
    spec, data, scale = _read_quant(anchor, VLLM_FUSED_SILU, "out", "scales", k)
    aligns = spec.layout == "col" and _is_read_by_deepgemm_alone(scale)
    return FusedOp(x, None, k, (data, scale), (), spec.replace(layout="col_tma") if aligns else spec, aligns)


def _read_quant(
    anchor: Node, like: QuantSpec, data_name: str, scale_name: str, k: Any
) -> tuple[QuantSpec, Node | None, Node | None]:
    """The spec of the quantization of rows of k values, and the nodes that hold data and scale."""
    args: dict[str, Any] = dict(anchor.kwargs)
    (data, data_given), (scale, scale_given) = mutated(anchor, data_name), mutated(anchor, scale_name)
    if not isinstance(k, int):
        raise Unsupported(f"K is symbolic ({k}); the kernels need it as a constant")
    if args.get("scale_ub") is not None:
        raise Unsupported("the scales have an upper bound; the kernels support none")
    if dtype(data_given) != torch.float8_e4m3fn:
        raise Unsupported(f"the data is {str(dtype(data_given))[6:]}; the kernels make float8_e4m3fn")
    if k % args["group_size"]:
        raise Unsupported(f"K is {k}, not a multiple of the group, {args['group_size']}")
    stored = value(scale_given)
    if stored.dim() != 2:
        raise Unsupported(f"the scales have shape {tuple(stored.shape)}; the kernels make [M, G]")
    layout = layout_of(stored)
    several = not any(isinstance(size, int) and size == 1 for size in stored.shape)
    if several and (layout != "row") != args["is_scale_transposed"]:
        order = "columns" if args["is_scale_transposed"] else "rows"
        raise Unsupported(f"the scales have stride {tuple(stored.stride())} and are written as {order}")
    try:
        return like.replace(group=args["group_size"], layout=layout), data, scale
    except ValueError as error:
        raise Unsupported(str(error)) from None


def _check_inputs(found: FusedOp) -> None:
    """Raise Unsupported where our op does not accept what it would get."""
    rows = [rows_of(node, value(found.x).shape[-1]) for node in (found.x, found.residual) if node is not None]
    own = (value(found.arguments[0]), found.arguments[1], 0.0) if found.arguments else (None,)
    check_op(found.name, *rows, *own, found.spec)


def _replace(anchor: Node, found: FusedOp, new: Builder) -> Rewrite:
    """Our op, whose outputs go to the readers of those of vLLM's."""
    op = getattr(torch.ops.normquant, found.name).default
    own = (*found.arguments, 0.0) if found.arguments else (None,)  # a norm's, or the limit of a gated product
    args: tuple[Any, ...] = (*own, found.spec.encode())
    if found.residual is not None:
        with new.before(anchor):
            args = (as_rows(new, found.residual, found.k), *args)
    replaced = call_in_place_of(new, anchor, found.results, op, found.x, value(found.x).shape[-1], *args)
    scale = found.results[1]
    note = f"was {functionalized(anchor)}{LOST if _wants_powers_of_two(scale) else ''}"
    return Rewrite(replaced, like=anchor, note=note, free_strides=tuple(_deepgemms(scale)) if found.aligns else ())


def _saved(found: FusedOp, m: int) -> dict[str, int]:
    """Against the copy of a residual that is changed in place, and the transposition of scales that are not aligned."""
    copied = 2 * m * found.k * value(found.x).dtype.itemsize if found.residual is not None else 0
    turned = 2 * (found.spec.bytes(m, found.k) - m * found.k) if found.aligns else 0  # scales, read and written
    return {"bytes_saved": copied + turned, "kernels_saved": bool(copied) + bool(turned)}


def _deepgemms(scale: Node | None) -> list[Node]:
    """The calls of DeepGEMM that take these scales as those of the activation."""
    if scale is None:
        return []
    return [user for user in scale.users if functionalized(user) == DEEPGEMM and _argument(user, 1) is scale]


def _is_read_by_deepgemm_alone(scale: Node | None) -> bool:
    return scale is not None and len(_deepgemms(scale)) == len(scale.users)


def _wants_powers_of_two(scale: Node | None) -> bool:
    return any(_argument(gemm, 5) is True for gemm in _deepgemms(scale))


def _argument(node: Node, index: int) -> Any:
    """The argument of the operation that an auto_functionalized node calls."""
    target: Any = node.args[0]
    return node.kwargs.get(target._schema.arguments[index].name)
