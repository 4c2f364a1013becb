"""Who reads the scales of a quantization, in which layout, and how they get them from the fused op's [M, G]."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch.fx import Graph, Node

from normquant.compile.edit.build import call, shape_arg
from normquant.compile.find.axes import Form, order, through
from normquant.compile.find.graph import arguments, aten, dtype, is_call, is_view, same_shape, value
from normquant.compile.find.quant_ops import layout_of_strides
from normquant.spec import Layout

Sinks = list[tuple[Node, Form]]


def sinks(scale: Node, form: Form, inner: Collection[Node]) -> Sinks:
    """The views of the scales that something outside of the quantization reads, and how the axes lie in each."""
    found: Sinks = []
    pending = [(scale, form)]
    while pending:
        node, form = pending.pop()
        read = False
        for user in node.users:
            moved = through(user, form) if is_view(user) else None
            same = _same_scales(node, user)
            if moved is not None and order(moved) is not None:
                pending.append((user, moved))
            elif same:
                pending += [(copy, form) for copy in same]
            elif user not in inner:
                read = True
        if read:
            found.append((node, form))
    return found


def _same_scales(node: Node, user: Node) -> list[Node]:
    """The nodes that hold exactly node's values again, after a copy, or a copy into a padded tensor and back out."""
    if is_call(user, aten.copy.default) and arguments(user)[1] is node:
        return [user] if dtype(user) == dtype(node) else []
    into = is_call(user, aten.slice_scatter.default) and arguments(user)[1] is node and _from_start(user, 2)
    if not into and not (is_call(user, aten.constant_pad_nd.default) and all(n == 0 for n in arguments(user)[1][::2])):
        return []
    back = [reader for reader in user.users if is_call(reader, aten.slice.Tensor) and _from_start(reader, 1)]
    same = [reader for reader in back if same_shape(value(reader).shape, value(node).shape)]
    return same if len(same) == len(user.users) else []


def _from_start(node: Node, at: int) -> bool:
    """Whether a slice, whose dimension is argument `at`, begins at 0 and leaves nothing out."""
    _, start, _, step = [*arguments(node)[at:], None, None, None, None][:4]
    return start in (None, 0) and step in (None, 1)


def choose_layout(scale: Node, form: Form, inner: Collection[Node]) -> Layout:
    """The layout that the readers of the scales have them in; column-major where only some do."""
    layouts = {_layout(node, f) for node, f in sinks(scale, form, inner)}
    for layout in ("col_tma", "col"):
        if layout in layouts:
            return layout
    return "row"


def _layout(node: Node, form: Form) -> Layout:
    tensor = value(node)
    place = {dim[0].name: i for i, dim in enumerate(form) if len({axis.name for axis in dim}) == 1}  # the innermost
    if set(place) == {"g"}:
        return layout_of_strides(1, 1, tensor.stride(place["g"]))
    if set(place) != {"m", "g"}:
        return "row"
    rows: Any = 1
    for i, dim in enumerate(form):
        if dim and dim[0].name == "m":
            rows = rows * tensor.shape[i]
    return layout_of_strides(rows, tensor.stride(place["m"]), tensor.stride(place["g"]))


def rebuild(graph: Graph, scale: Node, node: Node, form: Form) -> Node:
    """The tensor of `node`, whose axes lie as `form` says, from the op's scale [M, G]; views where possible."""
    if order(form) == ["g", "m"]:
        scale = call(graph, aten.permute.default, (scale, [1, 0]))
    if list(value(scale).shape) == list(value(node).shape):
        return scale
    return call(graph, aten.reshape.default, (scale, shape_arg(graph, value(node).shape, scale)))


def laid_out(graph: Graph, scale: Node, layout: Layout) -> Node:
    """A copy of the op's scale [M, G] in another layout than the op made it in, by rows or by columns."""

    def copy(node: Node) -> Node:
        return call(graph, aten.clone.default, (node,), {"memory_format": torch.contiguous_format})

    if layout == "row":
        return copy(scale)
    turned = call(graph, aten.permute.default, (scale, [1, 0]))
    return call(graph, aten.permute.default, (copy(turned), [1, 0]))
