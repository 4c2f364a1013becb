"""Nodes that compute the same value again: a norm that the router and the experts each write down is one norm."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch.fx import Graph, Node

from normquant.compile.find.graph import aten, is_call, is_view, mutation_regions


class Values:
    """Which nodes of a graph hold one value. Worked out when it is first asked for, of the graph as it is then."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    @cached_property
    def regions(self) -> dict[Node, int]:
        return mutation_regions(self.graph)

    @cached_property
    def equal(self) -> dict[Node, list[Node]]:
        return equal_nodes(self.graph, self.regions)

    def same(self, a: Node, b: Node) -> bool:
        """Whether two nodes hold one value: they are one, or compute it twice."""
        return a is b or (a.target == b.target and b in self.equal.get(a, ()))


def equal_nodes(graph: Graph, regions: Mapping[Node, int]) -> dict[Node, list[Node]]:
    """For each node that a pure operation makes, all nodes with its value, in the order of the graph.

    Equal are nodes that call one operation on equal arguments, in one of the `regions` of `mutation_regions`. A node
    that is changed in place equals no other.
    """
    equal: dict[Node, list[Node]] = {}
    by_key: dict[Hashable, list[Node]] = {}
    written = _written(graph, regions)
    for node in graph.nodes:
        if node not in written and _is_pure(node):
            key = (node.target, regions[node], _key(node.args, equal), _key(node.kwargs, equal))
            same = by_key.setdefault(key, [])
            same.append(node)
            equal[node] = same
    return equal


def _is_pure(node: Node) -> bool:
    """Whether an operation makes the same value whenever it is called on the same arguments."""
    if node.op != "call_function":
        return False
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return target is operator.getitem
    undefined = torch.Tag.nondeterministic_seeded in target.tags or "empty" in target._opname
    return not undefined and not target._schema.is_mutable


def _key(arg: Any, equal: Mapping[Node, list[Node]]) -> Hashable:
    """An argument as something that is equal where the argument is; 1, 1.0 and True differ."""
    if isinstance(arg, Node):
        return equal[arg][0] if arg in equal else arg
    if isinstance(arg, (list, tuple)):
        return tuple(_key(part, equal) for part in arg)
    if isinstance(arg, dict):
        return tuple((name, _key(part, equal)) for name, part in arg.items())
    return type(arg), repr(arg)


def _written(graph: Graph, regions: Mapping[Node, int]) -> set[Node]:
    """The nodes that an operation may change in place, themselves or through a view."""
    written: set[Node] = set()
    region = 0
    for node in graph.nodes:
        if regions[node] == region:
            continue
        region = regions[node]  # each begins with an operation that changes a tensor
        pending = [node.args[0]] if is_call(node, aten.copy_.default) else list(node.all_input_nodes)
        while pending:
            source = pending.pop()
            if isinstance(source, Node) and source not in written:
                written.add(source)
                pending += source.all_input_nodes if is_view(source) else []
    return written
