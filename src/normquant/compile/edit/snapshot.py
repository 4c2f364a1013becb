"""A graph as it was, so that a rewrite that fails half-way leaves no mark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch.fx import Graph, Node
from torch.fx.node import map_arg


@dataclass(frozen=True)
class NodeState:
    """What a rewrite may change of a node."""

    node: Node
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    meta: dict[str, Any]

    def restore(self) -> None:
        """Give a node that is still in the graph back what it had."""
        self.node.args, self.node.kwargs = self.args, self.kwargs
        self.node.meta.clear()
        self.node.meta.update(self.meta)


def states(nodes: Iterable[Node]) -> tuple[NodeState, ...]:
    """The nodes as they are now."""
    return tuple(NodeState(node, node.name, node.args, dict(node.kwargs), dict(node.meta)) for node in nodes)


def restore(graph: Graph, before: Sequence[NodeState]) -> None:
    """Make a graph again what it was when `before` was taken of all its nodes. Nodes that were erased since are made
    anew, under their names."""
    left = set(graph.nodes)
    now = {state.node: state.node if state.node in left else _made_anew(graph, state) for state in before}
    for first, second in pairwise(now.values()):
        first.append(second)
    for state in before:
        node = now[state.node]
        args, kwargs = map_arg((state.args, state.kwargs), now.__getitem__)
        NodeState(node, state.name, args, kwargs, state.meta).restore()
    kept = set(now.values())
    for node in reversed(graph.nodes):
        if node not in kept:
            graph.erase_node(node)


def _made_anew(graph: Graph, state: NodeState) -> Node:
    node = graph.create_node(state.node.op, state.node.target, type_expr=state.node.type)
    node.name = state.name  # the graph still counts it as taken, so it names no other node
    return node
