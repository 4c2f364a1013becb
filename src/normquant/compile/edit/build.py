"""Making nodes: each with the fake value that it computes, so that the next one can be made from it."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from normquant.compile.find.graph import aten, is_tensor, same_shape, value


def call(graph: Graph, target: Any, args: tuple, kwargs: dict[str, Any] | None = None) -> Node:
    """A new node with the fake value that it makes."""
    node = graph.call_function(target, args, kwargs)
    values = map_arg(args, lambda n: n.meta["val"])
    fake = next((v.fake_mode for v in _tensors(values) if hasattr(v, "fake_mode")), None)
    with fake if fake is not None else nullcontext():
        node.meta["val"] = target(*values, **node.kwargs)
    return node


def shape_arg(graph: Graph, shape: Sequence[Any], like: Node) -> list[Any]:
    """A shape as the argument of a reshape: one symbolic size is left to be inferred, more are read off the graph."""
    symbolic = [i for i, size in enumerate(shape) if not isinstance(size, int)]
    if len(symbolic) <= 1:
        return [-1 if i in symbolic else size for i, size in enumerate(shape)]
    return [size if isinstance(size, int) else _size_node(graph, size) for size in shape]


def _size_node(graph: Graph, size: Any) -> Node:
    """A node that holds a symbolic size, before the point of insertion."""
    for node in graph.find_nodes(op="placeholder"):
        val = node.meta.get("val")
        if isinstance(val, torch.SymInt) and same_shape((val,), (size,)):
            return node
    for node in graph.find_nodes(op="placeholder"):
        if is_tensor(node):
            for i, candidate in enumerate(value(node).shape):
                if not isinstance(candidate, int) and same_shape((candidate,), (size,)):
                    return call(graph, aten.sym_size.int, (node, i))
    raise AssertionError(f"no input of the graph has the size {size}")


def as_rows(graph: Graph, node: Node, k: int) -> Node:
    """[..., K] as [M, K]."""
    shape = value(node).shape
    return node if len(shape) == 2 and shape[1] == k else call(graph, aten.reshape.default, (node, [-1, k]))


def as_row(graph: Graph, weight: Node, k: int) -> Node:
    return weight if value(weight).dim() == 1 else call(graph, aten.reshape.default, (weight, [k]))


def shaped(graph: Graph, new: Node, old: Node) -> Node:
    """new with the shape of old."""
    if same_shape(value(new).shape, value(old).shape):
        return new
    return call(graph, aten.reshape.default, (new, shape_arg(graph, value(old).shape, new)))


def replace_results(
    graph: Graph, before: Node, results: Sequence[Node | None], target: Any, source: Node, k: int, *args: Any
) -> None:
    """Call an op on `source` [..., K], as [M, K], and `args`, and hand its outputs to whoever reads `results`.

    before: the node that the op is put in front of. The outputs take the shapes of the results; None has no readers.
    """
    with graph.inserting_before(before):
        op = call(graph, target, (as_rows(graph, source, k), *args))
        outputs = [call(graph, operator.getitem, (op, i)) for i in range(len(results))]
        pairs = zip(results, outputs, strict=True)
        new = [(old, shaped(graph, output, old)) for old, output in pairs if old is not None]
    for old, output in new:
        old.replace_all_uses_with(output)


def _tensors(values: Any) -> list[Any]:
    return [v for v in torch.utils._pytree.tree_leaves(values) if isinstance(v, torch.Tensor)]
