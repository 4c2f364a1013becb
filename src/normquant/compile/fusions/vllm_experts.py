"""vLLM's layers of experts, each one opaque operation that takes the norm in bf16 and quantizes it inside.

    y = vllm::moe_forward_shared(x, router_logits, ...)

The router in front or inside of it reads x in bf16, the routed experts and the shared expert's linear quantize it. So
the quantization comes out, by the rule of the routed experts, and is handed in beside x:

    data, scale = group_quant(x)
    y = normquant_vllm::moe_forward_shared(x, data, scale, spec, router_logits, ...)

The other fusions then find it behind its norm.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.fx import Graph, Node

from normquant.compile.edit.build import Builder, Rewrite
from normquant.compile.find.graph import Unsupported, arguments, value
from normquant.compile.find.quant_ops import called, functionalized, is_group_quant
from normquant.compile.fusions.acceptance import check_op, rows_of
from normquant.compile.fusions.candidate import (
    Candidate,
    Findings,
    Rejection,
    rejected,
    site_name,
    source_line,
)
from normquant.spec import QuantSpec

MOE, MOE_SHARED = "vllm::moe_forward", "vllm::moe_forward_shared"
NOTE = "is handed to the experts, which quantized inside"


@dataclass(frozen=True)
class ExpertInputs:
    """The fusion. spec: how experts quantize here, or why they can be given nothing; asked when a graph has some."""

    spec: Callable[[], QuantSpec | str] = field(repr=False, compare=False)

    def __call__(self, graph: Graph) -> Findings:
        for node in list(graph.nodes):
            if node.op == "call_function" and called(node) in (MOE, MOE_SHARED):
                yield self._candidate(node)

    def _candidate(self, node: Node) -> Candidate | Rejection:
        name, where, spec = site_name(node), source_line(node), self.spec()
        reason = spec if isinstance(spec, str) else _unsupported(node, spec)
        if isinstance(spec, str) or reason is not None:
            return rejected(name, where, f"{called(node)} quantizes inside: {reason}")
        x = value(hidden_states(node))
        m, k = x.shape
        return Candidate(name, where, "group_quant", x, m, k, spec, partial(_take_out, node, spec))


def hidden_states(node: Node) -> Node:
    """What a call of either operation quantizes."""
    found: Any = node.kwargs["hidden_states"] if functionalized(node) else arguments(node)[0]
    return found


def _unsupported(node: Node, spec: QuantSpec) -> str | None:
    """What keeps the input from being handed in as a form of this spec."""
    if functionalized(node) and "hidden_states" not in node.kwargs:
        return "it is functionalized by auto_functionalized_v2, which vLLM does not use"
    source = hidden_states(node)
    x = value(source)
    if x.dim() != 2 or not x.is_contiguous() or not isinstance(x.shape[1], int):
        return (
            f"its input has shape {tuple(x.shape)} and stride {x.stride()}; [M, K], contiguous, K constant, is accepted"
        )
    others = {QuantSpec.decode(str(arguments(user)[1])) for user in source.users if is_group_quant(user)}
    if any(other.replace(layout=spec.layout) != spec for other in others):
        return "a linear outside of it quantizes the same input by another rule"
    try:
        check_op("group_quant", rows_of(source, x.shape[1]), spec)
    except Unsupported as reason:
        return str(reason)
    return None


def _take_out(node: Node, spec: QuantSpec, new: Builder) -> Rewrite:
    source, name = hidden_states(node), called(node).partition("::")[2]
    ours: Any = getattr(torch.ops.normquant_vllm, name).default
    with new.before(node):
        quantized = new(torch.ops.normquant.group_quant.default, source, spec.encode())
        data, scale = (new(operator.getitem, quantized, i) for i in range(2))
        if functionalized(node):
            form = {"data": data, "scale": scale, "spec": spec.encode()}
            call = new(node.target, ours, **dict(node.kwargs) | form)
        else:
            others = arguments(node)[1:]
            call = new(ours, source, data, scale, spec.encode(), *others)
    return Rewrite(((node, call),), like=node, note=NOTE, stands_for=quantized)
