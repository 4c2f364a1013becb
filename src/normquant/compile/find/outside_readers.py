"""Who reads a site from outside, and how: its norm may be read, as another output of the op, its scales in a layout of
their reader's, and what is inside not at all."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch.fx import Node

from normquant.compile.find import quant_ops
from normquant.compile.find.axes import Form, order, through
from normquant.compile.find.found import Match
from normquant.compile.find.graph import (
    Unsupported,
    arguments,
    asks_shape,
    aten,
    dtype,
    is_call,
    is_narrowing,
    is_view,
    is_widening,
    keeps_order,
    op_name,
    peel,
    same_shape,
    value,
)
from normquant.compile.find.quant_ops import layout_of_strides
from normquant.compile.find.quants import Quant
from normquant.spec import Layout


def check_inside(match: Match, known: Collection[Node]) -> None:
    """Raises Unsupported where a node inside of the site is read by one that is not `known` to be rewritten as well."""

    def outside(node: Node) -> list[Node]:
        return [u for u in node.users if u not in known and not asks_shape(u, match.norm.sources[0])]

    for node in (node for norm in match.same for node in norm.inner):
        readers = [user for user in outside(node) if user not in match.sums]
        if readers:
            raise Unsupported(_read_by(node, "the norm", readers[0]))
    for quant in match.quants:
        for node in quant.inner:
            readers = outside(node)
            if readers and not (is_view(node) or is_widening(node)) and not _only_pads(node, quant):
                raise Unsupported(_read_by(node, "the quantization", readers[0]))


def check_unread(inner: Collection[Node], results: Collection[Node | None], where: str) -> None:
    """Raises Unsupported where a node inside of a site is read by one that is neither inside nor a result of it.

    Dead code counts as nothing. where: what the nodes are, in words.
    """
    for node in sorted(inner):
        for user in node.users:
            if user not in inner and user not in results and (user.users or user.op == "output"):
                raise Unsupported(f"{node.name}, {where}, is also read by {user.name}")


def _read_by(node: Node, where: str, reader: Node) -> str:
    return f"{op_name(node)} inside of {where} is also read by {op_name(reader)} ({reader.name})"


def _only_pads(node: Node, quant: Quant) -> bool:
    return quant_ops.is_quant(node) and all(user in (quant.data, quant.scale) or not user.users for user in node.users)


def norms_outside(match: Match, gone: Collection[Node]) -> tuple[Node, ...]:
    """The nodes that hold the norm, in the activation dtype, for readers that are not in `gone`.

    Raises Unsupported where one of them reads the norm before it is rounded.
    """
    outside: list[Node] = []
    pending = list(match.ys)
    while pending:
        node = pending.pop()
        for user in node.users:
            if is_view(user) or is_widening(user):
                pending.append(user)
            elif user not in gone and user not in match.results and not asks_shape(user, match.norm.sources[0]):
                outside.append(user if _rounds_y(user, node, match) else node)
    if dtype(match.norm.y) == match.norm.dtype:
        return match.ys if outside else ()
    unrounded = [node for node in outside if not is_narrowing(node)]
    if unrounded:
        raise Unsupported("the norm before its rounding is also read by an operation outside of the site")
    return tuple(dict.fromkeys(outside))


def _rounds_y(user: Node, node: Node, match: Match) -> bool:
    """Whether user is the norm rounded to the activation dtype, in the norm's order."""
    return is_narrowing(user) and dtype(user) == match.norm.dtype and peel(node, keeps_order) in match.ys


def sinks(scale: Node, form: Form, inner: Collection[Node]) -> list[tuple[Node, Form]]:
    """The views of the scales that something outside of the quantization reads, and how the axes lie in each."""
    found: list[tuple[Node, Form]] = []
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
