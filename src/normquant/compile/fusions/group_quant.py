"""Replace vLLM's quantizations that no norm and no gated product feeds, such as that of the attention's output.

Nothing is fused: one of our kernels takes the place of vLLM's, where the policy says so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from normquant.compile.driver import module_path, source_line
from normquant.compile.edit.build import replace_results
from normquant.compile.find.graph import Unsupported, op_name, value
from normquant.compile.find.quant_ops import is_group_quant, is_quant, quantized, read
from normquant.compile.find.sites import rows_are_even
from normquant.compile.policy import Facts, Rules
from normquant.compile.report import Site
from normquant.spec import ACTIVATION_DTYPES


def replace_lone_quants(graph: Graph, rules: Rules) -> tuple[Site, ...]:
    """Replace every quantization that the rules want "fused"; returns those that were. Dead nodes are taken out."""
    sites = []
    for anchor in [node for node in graph.nodes if is_quant(node) and not is_group_quant(node)]:
        site = _treat(graph, anchor, rules)
        if site is not None:
            sites.append(site)
    if sites:
        graph.eliminate_dead_code()
    return tuple(sites)


def _treat(graph: Graph, anchor: Node, rules: Rules) -> Site | None:
    source: Any = anchor.kwargs["input"]  # with its views: attention's output has heads, and is quantized by whole rows
    x = value(source)
    k = x.shape[-1]
    if not isinstance(k, int) or x.dtype not in ACTIVATION_DTYPES or x.stride(-1) != 1 or not rows_are_even(x, k):
        return None
    rows = x.numel() // k
    name = module_path(anchor) or anchor.name
    m = rows if isinstance(rows, int) else None
    decision = rules.decide(name, Facts(x.device, "group_quant", m, k, opaque_norm=False))
    if decision.strategy != "fused":
        return None
    try:
        quant = read(anchor, k)
    except Unsupported:
        return None  # the report of the norm pass has the reason
    op = torch.ops.normquant.group_quant.default
    replace_results(graph, anchor, (quant.data, quant.scale), op, source, k, quant.spec.encode())
    reason = f"{decision.reason}; its input is {op_name(quantized(anchor))}, so that nothing is fused into it"
    facts: dict[str, Any] = {"m": str(rows), "k": k, "dtype": str(x.dtype)[6:], "spec": quant.spec.encode()}
    return Site(name, source_line(anchor), "fused", reason, op="group_quant", **facts)
