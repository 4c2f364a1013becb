"""Quantizations that no norm and no gated product feeds, such as that of the attention's output.

There is nothing to fuse. In vLLM's graphs one of our kernels takes the place of vLLM's, where the policy says so; with
the strategy `native` an opaque quantization becomes aten operations.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.fx import Graph, Node

from normquant.compile.edit.build import Builder, Rewrite, call_in_place_of
from normquant.compile.edit.decompose import decompose
from normquant.compile.find.described import described
from normquant.compile.find.found import Rejected
from normquant.compile.find.graph import Unsupported, value
from normquant.compile.find.quant_ops import is_group_quant, is_quant, quantized, read
from normquant.compile.find.quants import Quant
from normquant.compile.fusions.acceptance import check_op, rows_of
from normquant.compile.fusions.candidate import (
    Candidate,
    Findings,
    Rejection,
    rejected,
    site_name,
    source_line,
)


def find(graph: Graph) -> Findings:
    """vLLM's quantizations that are left in the graph; other fusions have recorded them."""
    for anchor in [node for node in graph.nodes if is_quant(node) and not is_group_quant(node)]:
        found = _candidate(anchor)
        if found is not None:
            yield found


def _candidate(anchor: Node) -> Candidate | None:
    source: Any = anchor.kwargs["input"]  # with its views: attention's output has heads, and is quantized by whole rows
    x = value(source)
    k = x.shape[-1]
    if not isinstance(k, int):
        return None
    try:
        quant = read(anchor, k)
        check_op("group_quant", rows_of(source, k), quant.spec)
    except Unsupported:
        return None  # the record of the norm fusion has the reason
    name, where, fuse = site_name(anchor), source_line(anchor), partial(_replace, anchor, source, quant, k)
    return Candidate(name, where, "group_quant", x, x.numel() // k, k, quant.spec, fuse, lone=anchor, listed=True)


def _replace(anchor: Node, source: Node, quant: Quant, k: int, new: Builder) -> Rewrite:
    op = torch.ops.normquant.group_quant.default
    replaced = call_in_place_of(new, anchor, (quant.data, quant.scale), op, source, k, quant.spec.encode())
    note = f"its input is {described(quantized(anchor))}, so that nothing is fused into it"
    return Rewrite(replaced, like=anchor, note=note)


def lone_quantization(other: Rejected) -> Candidate | Rejection:
    """A quantization without a norm, of any graph: an opaque one can become aten operations."""
    anchor, name, where = other.anchor, site_name(other.anchor), source_line(other.anchor)
    if not is_quant(anchor):
        return rejected(name, where, other.reason, lone=anchor)
    x = value(quantized(anchor))
    k = x.shape[-1] if isinstance(x.shape[-1], int) else 0
    return Candidate(
        name,
        where,
        "group_quant",
        x,
        x.numel() // k if k else "?",
        k,
        spec=None,
        fuse=None,
        native=lambda new: Rewrite(decompose(new, [anchor]), like=anchor),
        remark=other.reason,
        lone=anchor,
    )
