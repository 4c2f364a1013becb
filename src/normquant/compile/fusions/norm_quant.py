"""Replace a site by one fused op."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from normquant.compile.edit.build import as_row, as_rows, call, shaped
from normquant.compile.find.graph import Unsupported, asks_shape, aten, is_alias, is_view, op_name, peel
from normquant.compile.find.scale_layout import laid_out, rebuild, sinks
from normquant.compile.find.sites import Match
from normquant.spec import QuantSpec

COPIED_META = ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node", "seq_nr")


# aten operations that run as library calls
EXTERN = {
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "convolution",
    "_scaled_mm",
    "_scaled_grouped_mm",
    "_grouped_mm",
    "index_put",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
}


class Rewriter:
    """Rewrites the sites of one graph, one after the other; a site may read what another one made."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.replaced: dict[Node, Node] = {}  # what the nodes of the graph as it was are now
        self.owners = _owners(graph)

    def now(self, node: Node) -> Node:
        return self.replaced.get(node, node)

    def inputs(self, match: Match, add: bool) -> tuple[Node, ...]:
        """x, or both addends, and the weight."""
        addition, norm = match.norm.addition, match.norm
        sources = (addition.x, addition.residual) if add and addition else norm.sources
        return tuple(self.now(node) for node in (*sources, norm.weight))

    def adds(self, match: Match) -> bool:
        """Whether the residual add goes into the op.

        An unrounded sum exists nowhere else. A rounded one goes in where both addends lie in memory anyway: a kernel
        that computes one of them can add the other for less than the op, which would have to read it back.
        """
        addition = match.norm.addition
        if addition is None:
            return False
        if addition.sum == "fp32":
            return True
        if any(node in self.replaced for node in match.sums):
            return False  # an earlier site's op made the sum
        return all(in_memory(self.now(node)) for node in (addition.x, addition.residual)) and self.in_time(match, True)

    def in_time(self, match: Match, add: bool) -> bool:
        """Whether everyone who would read the op's outputs comes after its inputs."""
        last = max(self.inputs(match, add))
        return all(last < reader for reader in self._readers(match, add))

    def _readers(self, match: Match, add: bool) -> set[Node]:
        made = match.results.union(match.sums if add else ())
        return {user for node in made for user in node.users if user not in match.inner}

    def position(self, match: Match, add: bool) -> Node:
        """The first node, after the op's inputs, that reads what the op makes or is replaced by it."""
        last = max(self.inputs(match, add))
        made = match.results.union(match.sums if add else ())
        return min(node for node in match.inner | made | self._readers(match, add) if node > last)

    def fuse(self, match: Match) -> Node:
        """Put the fused op in, hand its outputs to everyone who read the site's, and return it. Dead nodes are left."""
        add = self.adds(match)
        if not self.in_time(match, add):
            raise Unsupported("the weight is computed after the sum that the norm reads was used")
        with self.graph.inserting_before(self.position(match, add)):
            *sources, weight = self.inputs(match, add)
            rows = [as_rows(self.graph, node, match.norm.k) for node in sources]
            args = (*rows, as_row(self.graph, weight, match.norm.k), match.norm.eps, match.norm.weight_offset)
            op = call(self.graph, fused_op(match, add), (*args, op_spec(match, add).encode()))
            outputs = [call(self.graph, operator.getitem, (op, i)) for i in range(len(op.meta["val"]))]
            replacements = self.replacements(match, add, outputs)
        self.ask_input_for_shape(match)
        copy_meta(match.norm.y, [op, *outputs])
        for old, new in replacements:
            old.replace_all_uses_with(new)
            self.replaced[old] = new
        return op

    def keep_outputs_apart(self) -> None:
        """Copy what the graph returned as tensors of their own and now would return as one: callers may change one."""
        output = self.graph.output_node()
        returned: list[Any] = list(_returned(self.graph))
        first: dict[Node | None, Node | None] = {}
        for i, (before, owner) in enumerate(zip(self.owners, _owners(self.graph), strict=True)):
            if owner is not None and first.setdefault(owner, before) is not before:
                with self.graph.inserting_before(output):
                    returned[i] = call(self.graph, aten.clone.default, (returned[i],))
        if any(new is not old for new, old in zip(returned, _returned(self.graph), strict=True)):
            output.args = (tuple(returned),)

    def ask_input_for_shape(self, match: Match) -> None:
        """A value that is asked for nothing but its shape must not be computed for that."""
        source = self.now(match.norm.sources[0])
        inside = match.inner | match.results
        asking = [(user, node) for node in inside for user in node.users if asks_shape(user, source)]
        for user, node in asking:
            with self.graph.inserting_before(user):
                user.replace_input_with(node, shaped(self.graph, source, node))

    def replacements(self, match: Match, add: bool, outputs: list[Node]) -> list[tuple[Node, Node]]:
        data, scale, *rest = outputs
        pairs: list[tuple[Node, Node]] = []
        for quant in match.quants:
            if quant.data is not None:
                pairs.append((quant.data, data))
            if quant.scale is not None and quant.scale_form is None:
                copied = match.copies_scale(quant)
                pairs.append((quant.scale, laid_out(self.graph, scale, quant.spec.layout) if copied else scale))
        pairs += [(node, rest[-1]) for node in match.norms]
        pairs += [(node, rest[0]) for node in match.sums if add]
        placed = [(old, shaped(self.graph, new, old)) for old, new in pairs]
        for quant in match.quants:
            if quant.scale is not None and quant.scale_form is not None:
                readers = sinks(quant.scale, quant.scale_form, quant.inner)
                placed += [(node, rebuild(self.graph, scale, node, form)) for node, form in readers]
        return placed


def _returned(graph: Graph) -> tuple[Any, ...]:
    outputs: Any = graph.output_node().args[0]
    return tuple(outputs) if isinstance(outputs, (list, tuple)) else (outputs,)


def _owners(graph: Graph) -> list[Node | None]:
    """The node that made the memory of each output of the graph."""
    return [peel(node, is_alias) if isinstance(node, Node) else None for node in _returned(graph)]


def op_spec(match: Match, add: bool) -> QuantSpec:
    """The spec of the site's op; without an add, `sum` says nothing and is left at its default."""
    return match.spec if add else match.spec.replace(sum=QuantSpec().sum)


def fused_op_name(match: Match, add: bool) -> str:
    """The op of a site, by name."""
    return ("add_" if add else "") + "rms_norm_quant" + ("_with_norm" if match.norms else "")


def fused_op(match: Match, add: bool) -> Any:
    """The op of a site."""
    packet = getattr(torch.ops.normquant, fused_op_name(match, add))
    return packet.tensor if isinstance(match.norm.eps, Node) else packet.default


def in_memory(node: Node) -> bool:
    """Whether a value is written to memory whatever happens: it comes from outside or from an operation that the
    compiler calls rather than generates, or somebody else reads it too."""
    node = peel(node, is_view)
    if node.op != "call_function" or len(node.users) > 1:
        return True
    made_by = op_name(node).split(".")
    return made_by[0] not in ("aten", "prims") or made_by[-1] in EXTERN


def copy_meta(source: Node, nodes: Sequence[Node]) -> None:
    for node in nodes:
        for key in COPIED_META:
            if key in source.meta:
                node.meta[key] = source.meta[key]
