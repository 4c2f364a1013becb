"""The strategy `native`: an opaque quantization becomes aten operations, so that the compiler can make one kernel of it
and of what stands before it. Scales in columns are stored there by that kernel, without a copy: see `_by_column`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from normquant.compile.edit.build import Builder, shaped
from normquant.compile.find.graph import Unsupported, aten, prims, value
from normquant.compile.find.quant_ops import read, source
from normquant.compile.find.quants import Quant
from normquant.spec import FP8_MAX, MAX_POWER, TMA_ALIGN, QuantSpec


def decompose(new: Builder, ops: Sequence[Node]) -> tuple[tuple[Node, Node], ...]:
    """(old, new) results of opaque quantizations of one tensor, in the order of the graph and of specs that differ in
    nothing but the layout of the scales, in aten operations of the same arithmetic. They share one result, with a copy
    of the scales for each further layout: two would keep the compiler from making one kernel.

    Raises Unsupported for packed scales, and for TMA-aligned ones where the rows are not known to be a multiple of 4.
    """
    y = source(ops[0])
    k = value(y).shape[-1]
    quants = [read(op, k) for op in ops]
    _check(quants, value(y).numel() // k)
    with new.before(ops[0]):
        data, scale = _quantize(new, y, quants[0].spec)
        columns = _by_column(new, scale) if any(quant.spec.layout != "row" for quant in quants) else scale
        pairs = [(quant.data, data) for quant in quants]
        pairs += [(quant.scale, scale if quant.spec.layout == "row" else columns) for quant in quants]
        return tuple((old, shaped(new, made, old)) for old, made in pairs if old is not None)


def _check(quants: Sequence[Quant], rows: Any) -> None:
    spec = quants[0].spec
    if spec.scale == "ue8m0_packed":
        raise Unsupported("packed scales are not made by aten operations")
    if spec.few_rows or spec.divide == "fast_factor":
        raise Unsupported("the rule of FlashInfer's linear kernel is not made of aten operations")
    if spec.divide == "fast_amax":
        raise Unsupported("the approximate reciprocal is not made by aten operations")
    aligned = any(quant.spec.layout == "col_tma" for quant in quants)
    if aligned and not (isinstance(rows, int) and rows % TMA_ALIGN == 0):
        raise Unsupported("TMA-aligned scales take a copy where the rows are not a multiple of 4")


def _quantize(new: Builder, y: Node, spec: QuantSpec) -> tuple[Node, Node]:
    """The arithmetic of `normquant.reference.group_quant`: data [M, K], scales [M, G] by rows."""
    k = value(y).shape[-1]
    wide = new(prims.convert_element_type.default, y, torch.float32)
    grouped = new(aten.reshape.default, wide, [-1, k // spec.group, spec.group])  # [M, G, group]
    magnitude = new(aten.abs.default, grouped)
    if spec.nan == "ignore":
        number = new(aten.eq.Tensor, magnitude, magnitude)
        magnitude = new(aten.where.self, number, magnitude, _constant(new, magnitude, 0.0))
    amax = new(aten.amax.default, magnitude, [-1])  # [M, G]
    if spec.floor:
        amax = new(aten.clamp_min.default, amax, spec.floor)
    scale = _scale(new, amax, spec)
    above = new(aten.clamp_min.default, _divided(new, grouped, amax, scale, spec), -FP8_MAX)
    if spec.is_ue8m0 and spec.nan == "propagate":
        scale = new(aten.where.self, _is_finite(new, scale), scale, _constant(new, scale, MAX_POWER))
    fp8 = new(prims.convert_element_type.default, new(aten.clamp_max.default, above, FP8_MAX), spec.dtype)
    return new(aten.reshape.default, fp8, [-1, k]), scale


def _by_column(new: Builder, scale: Node) -> Node:
    """[M, G] stored by columns. A transposed amax would be stored so, too, but what is computed from it would walk over
    [G, M], and Inductor makes one kernel only of what walks over the rows as the norm does."""
    from torch._inductor import inductor_prims  # noqa: F401  # registers the operator

    rows = value(scale).shape[0]
    if not isinstance(rows, int):
        if torch.__version__ < (2, 13):  # its Inductor cannot put strides in order that are symbols
            columns = new(aten.permute.default, scale, [1, 0])
            stored = new(aten.clone.default, columns, memory_format=torch.contiguous_format)
            return new(aten.permute.default, stored, [1, 0])
        rows = new(aten.sym_size.int, scale, 0)
    return new(prims.inductor_force_stride_order.default, scale, [1, rows])


def _scale(new: Builder, amax: Node, spec: QuantSpec) -> Node:
    if spec.scale_by == "multiply":
        scale = new(aten.mul.Tensor, amax, 1.0 / FP8_MAX)
    elif spec.scale_by == "divide":
        scale = new(aten.div.Tensor, amax, _constant(new, amax, FP8_MAX))
    else:
        scale = new(aten.div.Tensor, amax, FP8_MAX)
    if spec.scale_floor:
        scale = new(aten.clamp_min.default, scale, spec.scale_floor)
    if not spec.is_ue8m0:
        return scale
    bits = new(aten.add.Tensor, new(aten.view.dtype, scale, torch.int32), 0x7FFFFF)
    up = new(aten.view.dtype, new(aten.bitwise_and.Scalar, bits, 0x7F800000), torch.float32)
    return new(aten.where.self, _is_finite(new, scale), up, scale)


def _is_finite(new: Builder, scale: Node) -> Node:
    return new(aten.lt.Scalar, new(aten.abs.default, scale), float("inf"))  # false for NaN as well


def _divided(new: Builder, grouped: Node, amax: Node, scale: Node, spec: QuantSpec) -> Node:
    if spec.divide == "scale":
        return new(aten.div.Tensor, grouped, new(aten.unsqueeze.default, scale, -1))
    if spec.divide == "reciprocal":
        factor = new(aten.reciprocal.default, scale)
    elif spec.divide == "factor":
        factor = new(aten.div.Tensor, _constant(new, amax, FP8_MAX), amax)
    else:
        factor = new(aten.mul.Tensor, new(aten.reciprocal.default, amax), FP8_MAX)
    return new(aten.mul.Tensor, grouped, new(aten.unsqueeze.default, factor, -1))


def _constant(new: Builder, like: Node, number: float) -> Node:
    fake: Any = value(like)
    with fake.fake_mode:
        return new(aten.full.default, [], number, dtype=torch.float32, device=fake.device)
