"""Take out of a graph what would become a kernel that only moves bytes: cast round trips, copies that nobody needs, and
layout copies in front of operations that read any layout.

Runs after a rewrite, and alone: an opaque norm that takes bf16 from a graph that computes in fp32 leaves such casts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

from normquant.compile.edit.build import Builder, shaped
from normquant.compile.find.graph import (
    PERMUTES,
    aten,
    dtype,
    first_arg,
    is_alias,
    is_call,
    is_cast,
    is_tensor,
    is_view,
    is_widening,
    keeps_order,
    op_name,
    peel,
)


@dataclass(frozen=True)  # equal passes share compiled code
class CleanupPass(CustomGraphPass):
    """`clean` as a pass of its own, for `post_grad_custom_pre_pass` or `post_grad_custom_post_pass`."""

    def __call__(self, graph: Graph) -> None:
        clean(graph)

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))


def clean(graph: Graph) -> int:
    """Remove needless copies and casts; returns how many. The values that the graph computes stay the same."""
    from torch._inductor.fx_passes.post_grad import remove_noop_ops

    before, new = len(graph.nodes), Builder(graph)
    for node in list(graph.nodes):
        if node.op == "call_function" and is_tensor(node):
            source = _round_trip(node) or _needless_layout(node)
            if source is not None and _may_alias(node, source):
                with new.before(node):
                    node.replace_all_uses_with(shaped(new, source, node))
    graph.eliminate_dead_code()
    remove_noop_ops(graph)
    return before - len(graph.nodes)


def _round_trip(node: Node) -> Node | None:
    """x, where node is x widened to fp32 and rounded back to its own dtype, with views in between."""
    if not is_cast(node) or dtype(first_arg(node)) != torch.float32:
        return None
    wide = peel(first_arg(node), keeps_order)
    if not is_widening(wide) or dtype(first_arg(wide)) != dtype(node):
        return None
    return first_arg(wide)


def _needless_layout(node: Node) -> Node | None:
    """x, where node is a copy of x into another layout and everyone who reads it reads any layout."""
    if not is_call(node, aten.clone.default) or not node.users or not is_call(peel_views(first_arg(node)), *PERMUTES):
        return None
    return first_arg(node) if all(map(_reads_any_layout, _readers(node))) else None


def peel_views(node: Node) -> Node:
    """Up through reshapes to the permute that changed the order, if there is one."""
    return peel(node, lambda n: keeps_order(n) and not is_call(n, aten.clone.default))


def _readers(node: Node) -> list[Node]:
    """Who reads a node, through views."""
    found: list[Node] = []
    pending = list(node.users)
    while pending:
        user = pending.pop()
        if is_alias(user):
            pending += user.users
        else:
            found.append(user)
    return found


def _reads_any_layout(reader: Node) -> bool:
    """Operations that the compiler generates code for, and those that say so."""
    if reader.op != "call_function" or not isinstance(reader.target, torch._ops.OpOverload):
        return False
    if torch.Tag.flexible_layout in reader.target.tags:
        return True
    return torch.Tag.pointwise in reader.target.tags or op_name(reader) in ("aten.amax", "aten.sum", "aten.mean")


def _may_alias(node: Node, source: Node) -> bool:
    """Not where a graph output would become a graph input, or two outputs one tensor."""
    outputs = set(node.graph.output_node().all_input_nodes)
    return node not in outputs or (
        source.op == "call_function" and source not in outputs and not _is_input_view(source)
    )


def _is_input_view(node: Node) -> bool:
    return peel(node, is_view).op == "placeholder"


def output_owners(graph: Graph) -> list[Node | None]:
    """The node that made the memory of each output of the graph."""
    return [peel(node, is_alias) if isinstance(node, Node) else None for node in _returned(graph)]


def keep_outputs_apart(graph: Graph, owners: Sequence[Node | None]) -> None:
    """Copy what the graph returned as tensors of their own and now would return as one: callers may change one.

    owners: `output_owners` before the rewrites.
    """
    output, new = graph.output_node(), Builder(graph)
    returned = list(_returned(graph))
    first: dict[Node | None, Node | None] = {}
    for i, (before, owner) in enumerate(zip(owners, output_owners(graph), strict=True)):
        if owner is not None and first.setdefault(owner, before) is not before:
            with new.before(output):
                returned[i] = new(aten.clone.default, returned[i])
    if new.made:
        output.args = (tuple(returned),)


def _returned(graph: Graph) -> tuple[Any, ...]:
    outputs: Any = graph.output_node().args[0]
    return tuple(outputs) if isinstance(outputs, (list, tuple)) else (outputs,)
