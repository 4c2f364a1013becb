"""Sums over the ranks of a group: torch's functional collectives, to which tracing turns `torch.distributed.all_reduce`
and the redistribution of a DTensor, and vLLM's operation."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from normquant.compile.find.graph import arguments, is_call, overload_name

WAIT = "_c10d_functional::wait_tensor"
ALL_REDUCE = "_c10d_functional::all_reduce"
COALESCED = "_c10d_functional::all_reduce_coalesced"
VLLM = "vllm::all_reduce"


@dataclass(frozen=True)
class AllReduce:
    """One reduced tensor.

    call: the collective, which may reduce several tensors; parts: what this rank gives for each, index: which it is.
    result: the node that holds what all ranks get. reduce_op: "sum", "avg", ... group: its name, vLLM's for vLLM's.
    """

    call: Node
    parts: tuple[Node, ...]
    index: int
    result: Node
    reduce_op: str
    group: str

    @property
    def part(self) -> Node:
        return self.parts[self.index]


def read_all_reduce(result: Node) -> AllReduce | None:
    """The all-reduce whose result a node is, None for any other node."""
    if overload_name(result.target) == VLLM:
        args = [*arguments(result), *result.kwargs.values()]
        return AllReduce(result, (args[0],), 0, result, "sum", str(args[1]))
    if overload_name(result.target) != WAIT:
        return None
    made: Any = arguments(result)[0]
    index = 0
    if is_call(made, operator.getitem):
        made, index = arguments(made)
    name = overload_name(made.target)
    if name not in (ALL_REDUCE, COALESCED):
        return None
    given, reduce_op, group = arguments(made)
    parts = (given,) if name == ALL_REDUCE else tuple(given)
    return AllReduce(made, parts, index, result, str(reduce_op).lower(), str(group))


def any_all_reduce(graph: Graph) -> bool:
    """Whether a graph has an all-reduce that `read_all_reduce` may know."""
    names = {overload_name(node.target) for node in graph.nodes if node.op == "call_function"}
    return not names.isdisjoint((ALL_REDUCE, COALESCED, VLLM))
