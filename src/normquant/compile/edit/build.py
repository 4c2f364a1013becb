"""Making nodes: each with the fake value that it computes, so that the next one can be made from it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from normquant.compile.edit.snapshot import states
from normquant.compile.find.axes import Form, order
from normquant.compile.find.graph import aten, is_tensor, same_shape, value
from normquant.spec import Layout

COPIED_META = ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node", "seq_nr")


class Builder:
    """Makes new nodes of a graph, one after the other, and changes none that is there."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.made: list[Node] = []

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A new node with the fake value that it makes. An operation that refuses its arguments leaves no node."""
        values, named = map_arg((args, kwargs), lambda n: n.meta["val"])
        made = target(*values, **named)
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = made
        self.made.append(node)
        return node

    @contextmanager
    def before(self, node: Node) -> Iterator[None]:
        """Put what is made into the graph in front of a node."""
        with self.graph.inserting_before(node):
            yield

    def erase(self) -> None:
        """Take everything that was made out of the graph again."""
        while self.made:
            self.graph.erase_node(self.made.pop())


@dataclass(frozen=True)
class Rewrite:
    """What a fusion wants changed, its new nodes being in the graph already and read by nobody.

    replaced: (old node, what its readers get in its place). redirected: (reader, old argument, new argument).
    like: the node whose place in the model's source the new nodes take over. note: for the report.
    free_strides: calls that take their arguments in any strides from now on.
    stands_for: the new node that the site's record is about; a fusion that takes that node in has the record.
    committed: called when the new nodes are read, for a fusion that has to know.
    erased: nodes that nothing reads any more then, and that the removal of dead code keeps: it takes them to have
    effects.
    """

    replaced: tuple[tuple[Node, Node], ...] = ()
    redirected: tuple[tuple[Node, Node, Node], ...] = ()
    like: Node | None = None
    note: str = ""
    free_strides: tuple[Node, ...] = ()
    stands_for: Node | None = None
    committed: Callable[[], None] | None = None
    erased: tuple[Node, ...] = ()

    def commit(self, made: Sequence[Node]) -> None:
        """Hand the new nodes to the readers of the old ones, which are left in the graph. All of it, or nothing."""
        before = states(self._changed())
        try:
            self._hand_over(made)
            if self.committed is not None:
                self.committed()
        except BaseException:
            for state in before:
                state.restore()
            raise
        for node in self.erased:
            if not node.users:
                node.graph.erase_node(node)

    def _changed(self) -> set[Node]:
        """The nodes of the graph as it was that get other arguments."""
        readers = {user for old, _ in self.replaced for user in old.users}
        return readers | {reader for reader, *_ in self.redirected} | set(self.free_strides)

    def _hand_over(self, made: Sequence[Node]) -> None:
        for reader, old, new in self.redirected:
            reader.replace_input_with(old, new)
        for old, new in self.replaced:
            old.replace_all_uses_with(new)
        for node in self.free_strides:
            node.meta.pop("eager_input_vals", None)  # Inductor would copy the arguments into the strides noted here
        meta = {key: self.like.meta[key] for key in COPIED_META if key in self.like.meta} if self.like else {}
        for node in made:
            node.meta.update(meta)


def shape_arg(new: Builder, shape: Sequence[Any]) -> list[Any]:
    """A shape as the argument of a reshape: one symbolic size is left to be inferred, more are read off the graph."""
    symbolic = [i for i, size in enumerate(shape) if not isinstance(size, int)]
    if len(symbolic) <= 1:
        return [-1 if i in symbolic else size for i, size in enumerate(shape)]
    return [size if isinstance(size, int) else _size_node(new, size) for size in shape]


def _size_node(new: Builder, size: Any) -> Node:
    """A node that holds a symbolic size, before the point of insertion."""
    for node in new.graph.find_nodes(op="placeholder"):
        val = node.meta.get("val")
        if isinstance(val, torch.SymInt) and same_shape((val,), (size,)):
            return node
    for node in new.graph.find_nodes(op="placeholder"):
        if is_tensor(node):
            for i, candidate in enumerate(value(node).shape):
                if not isinstance(candidate, int) and same_shape((candidate,), (size,)):
                    return new(aten.sym_size.int, node, i)
    raise AssertionError(f"no input of the graph has the size {size}")


def as_rows(new: Builder, node: Node, k: int) -> Node:
    """[..., K] as [M, K]."""
    shape = value(node).shape
    return node if len(shape) == 2 and shape[1] == k else new(aten.reshape.default, node, [-1, k])


def as_row(new: Builder, weight: Node, k: int) -> Node:
    return weight if value(weight).dim() == 1 else new(aten.reshape.default, weight, [k])


def shaped(new: Builder, node: Node, like: Node) -> Node:
    """node in the shape of another one."""
    if same_shape(value(node).shape, value(like).shape):
        return node
    return new(aten.reshape.default, node, shape_arg(new, value(like).shape))


def rebuild(new: Builder, scale: Node, like: Node, form: Form) -> Node:
    """The tensor of `like`, whose axes lie as `form` says, from the op's scale [M, G]; views where possible."""
    if order(form) == ["g", "m"]:
        scale = new(aten.permute.default, scale, [1, 0])
    if list(value(scale).shape) == list(value(like).shape):
        return scale
    return new(aten.reshape.default, scale, shape_arg(new, value(like).shape))


def laid_out(new: Builder, scale: Node, layout: Layout) -> Node:
    """A copy of the op's scale [M, G] in another layout than the op made it in, by rows or by columns."""

    def copy(node: Node) -> Node:
        return new(aten.clone.default, node, memory_format=torch.contiguous_format)

    if layout == "row":
        return copy(scale)
    return new(aten.permute.default, copy(new(aten.permute.default, scale, [1, 0])), [1, 0])


def call_in_place_of(
    new: Builder, anchor: Node, results: Sequence[Node | None], op: Any, source: Node, k: int, *args: Any
) -> tuple[tuple[Node, Node], ...]:
    """Call an op on `source` [..., K], as [M, K], and `args` in front of the anchor: (result, output in its shape).

    A result is None where nobody reads it.
    """
    with new.before(anchor):
        made = new(op, as_rows(new, source, k), *args)
        outputs = [new(operator.getitem, made, i) for i in range(len(results))]
        pairs = zip(results, outputs, strict=True)
        return tuple((old, shaped(new, output, old)) for old, output in pairs if old is not None)
