"""Replace a site by one fused op."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from normquant.compile import runtime_eps as runtime_eps  # registers the ops that a run-time epsilon needs
from normquant.compile.build import as_row, as_rows, call, shaped
from normquant.compile.graph import Unsupported, asks_shape, is_view, op_name, peel
from normquant.compile.scales import rebuild, sinks
from normquant.compile.sites import Match
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
        self.gone: set[Node] = set()

    def now(self, node: Node) -> Node:
        return self.replaced.get(node, node)

    def inputs(self, match: Match, add: bool) -> tuple[Node, ...]:
        """x, or both addends, and the weight."""
        addition, norm = match.norm.addition, match.norm
        sources = (addition.x, addition.residual) if add and addition else (norm.x or norm.y,)
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
        if any(node in self.replaced for node in addition.stored):
            return False  # an earlier site's op made the sum
        return all(in_memory(self.now(node)) for node in (addition.x, addition.residual)) and self.in_time(match, True)

    def in_time(self, match: Match, add: bool) -> bool:
        """Whether everyone who would read the op's outputs comes after its inputs."""
        last = max(self.inputs(match, add))
        return all(last < reader for reader in self._readers(match, add))

    def _readers(self, match: Match, add: bool) -> set[Node]:
        stored = match.norm.addition.stored if add and match.norm.addition else ()
        return {user for node in (*stored, *match.results) for user in node.users if user not in match.inner}

    def position(self, match: Match, add: bool) -> Node:
        """The first node, after the op's inputs, that reads what the op makes or is replaced by it."""
        last = max(self.inputs(match, add))
        stored = set(match.norm.addition.stored) if add and match.norm.addition else set()
        return min(node for node in match.inner | match.results | stored | self._readers(match, add) if node > last)

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
            replacements = self._replacements(match, add, outputs)
        self._ask_input_for_shape(match)
        _copy_meta(match.norm.y, [op, *outputs])
        for old, new in replacements:
            old.replace_all_uses_with(new)
            self.replaced[old] = new
        self.gone |= match.inner
        return op

    def _ask_input_for_shape(self, match: Match) -> None:
        """A value that is asked for nothing but its shape must not be computed for that."""
        source = self.now(match.norm.sources[0])
        inside = match.inner | match.results
        asking = [(user, node) for node in inside for user in node.users if asks_shape(user, source)]
        for user, node in asking:
            with self.graph.inserting_before(user):
                user.replace_input_with(node, shaped(self.graph, source, node))

    def _replacements(self, match: Match, add: bool, outputs: list[Node]) -> list[tuple[Node, Node]]:
        data, scale, *rest = outputs
        pairs: list[tuple[Node, Node]] = []
        for quant in match.quants:
            if quant.data is not None:
                pairs.append((quant.data, data))
            if quant.scale is not None and quant.scale_form is None:
                pairs.append((quant.scale, scale))
        if match.norms:
            pairs += [(node, rest[-1]) for node in match.norms]
        if add and match.norm.addition:
            pairs += [(node, rest[0]) for node in match.norm.addition.stored]
        placed = [(old, shaped(self.graph, new, old)) for old, new in pairs]
        for quant in match.quants:
            if quant.scale is not None and quant.scale_form is not None:
                readers = sinks(quant.scale, quant.scale_form, quant.inner)
                placed += [(node, rebuild(self.graph, scale, node, form)) for node, form in readers]
        return placed


def op_spec(match: Match, add: bool) -> QuantSpec:
    """The spec of the site's op; without an add, `sum` says nothing and is left at its default."""
    return match.spec if add else match.spec.but(sum=QuantSpec().sum)


def fused_op(match: Match, add: bool) -> Any:
    """The op of a site."""
    name = ("add_" if add else "") + "rms_norm_quant" + ("_with_norm" if match.norms else "")
    packet = getattr(torch.ops.normquant, name)
    return packet.tensor if isinstance(match.norm.eps, Node) else packet.default


def in_memory(node: Node) -> bool:
    """Whether a value is written to memory whatever happens: it comes from outside or from an operation that the
    compiler calls rather than generates, or somebody else reads it too."""
    node = peel(node, is_view)
    if node.op != "call_function" or len(node.users) > 1:
        return True
    made_by = op_name(node).split(".")
    return made_by[0] not in ("aten", "prims") or made_by[-1] in EXTERN


def _copy_meta(source: Node, nodes: Sequence[Node]) -> None:
    for node in nodes:
        for key in COPIED_META:
            if key in source.meta:
                node.meta[key] = source.meta[key]
