"""Who reads a site from outside: its norm may be read, as another output of the op, and what is inside may not."""

from __future__ import annotations

from collections.abc import Collection

from torch.fx import Node

from normquant.compile.find import quant_ops
from normquant.compile.find.found import Match
from normquant.compile.find.graph import (
    Unsupported,
    asks_shape,
    dtype,
    is_narrowing,
    is_view,
    is_widening,
    keeps_order,
    op_name,
    peel,
)
from normquant.compile.find.quants import Quant


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
