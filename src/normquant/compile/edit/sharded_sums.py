"""Sums that stay with the owners of their rows: a residual that nothing but the ops of a group reads is not sent."""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch.fx import Node

from normquant.compile.edit.build import Builder
from normquant.compile.find.graph import arguments, asks_shape, is_call, is_tensor, is_widening, keeps_order, peel
from normquant.ops.all_reduce_add_rms_norm_quant import op_name

RESIDUAL, SHARDED, GROUP = 1, -3, -2  # where the ops have these arguments


def keep_with_owners(op: Node, site: Collection[Node], new: Builder) -> list[tuple[Node, Node]]:
    """(old, new) outputs of the ops that lead to one whose own sum nobody reads, as far back as the next op alone reads
    the sum of each: made anew, so that a row's sum is written by its owner only, which is all that the next op needs.

    site: nodes that are gone when the op is read.
    """
    pairs: list[tuple[Node, Node]] = []
    reader: Any = op
    while (before := _maker_of_residual(reader)) is not None:
        if not is_read_by(peel(arguments(reader)[RESIDUAL], keeps_order), {reader, *site}):
            break
        args = list(arguments(before))
        args[SHARDED] = True
        with new.before(before):
            again = new(before.target, *args)
            pairs += [(old, new(operator.getitem, again, arguments(old)[1])) for old in before.users]
        reader = before
    return pairs


def is_read_by(total: Node, readers: Collection[Node]) -> bool:
    """Whether nothing but `readers`, and what is read by nobody, reads a value or a view of it."""
    pending = [total]
    while pending:
        node = pending.pop()
        for user in node.users:
            if user in readers or asks_shape(user, total) or _is_dead(user):
                continue
            if not (is_tensor(user) and (keeps_order(user) or is_widening(user))):
                return False
            pending.append(user)
    return True


def _is_dead(node: Node) -> bool:
    return node.op == "call_function" and not node.is_impure() and all(map(_is_dead, node.users))


def _maker_of_residual(reader: Node) -> Node | None:
    """The op of the same group whose sum is the residual of another one; None for any other residual, and without."""
    if reader.target not in _sums(True):
        return None
    made = peel(arguments(reader)[RESIDUAL], keeps_order)
    if not is_call(made, operator.getitem):
        return None
    before, index = arguments(made)
    sums = _sums(True) | _sums(False)
    if sums.get(before.target) != index or arguments(before)[GROUP] != arguments(reader)[GROUP]:
        return None
    return before


def _sums(with_residual: bool) -> dict[Any, int]:
    """The ops with a residual or those without, and which of their outputs the sum is."""
    kinds = ((True, False), (True, True), (False, True))  # quantized, with the norm
    return {getattr(torch.ops.normquant, op_name(with_residual, *kind)).default: 2 * kind[0] for kind in kinds}
