"""What a quantization's input is, in words, where it is nothing that a kernel here computes."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from normquant.compile.find.graph import is_cast, is_view, op_name, peel

ROOTS = {"aten.rsqrt", "aten.sqrt", "aten._fused_rms_norm", "vllm_ir.rms_norm", "vllm_ir.fused_add_rms_norm"}
CLAMPS = {"aten.clamp", "aten.clamp_min", "aten.clamp_max", "aten.minimum", "aten.maximum"}
NEAR = 32  # operations that are looked at


def described(y: Node) -> str:
    """ "a gated norm", "a gated product that is clamped", "a gated product", or the name of the operation."""
    made_by = peel(y, is_view, is_cast)
    if op_name(made_by) != "aten.mul":
        return op_name(made_by)
    names = {op_name(node) for node in _pointwise_above(made_by)}
    if not ("aten.sigmoid" in names or {"aten.exp", "aten.neg"} <= names):
        return op_name(made_by)
    if names & ROOTS:
        return "a gated norm"
    return "a gated product that is clamped" if names & CLAMPS else "a gated product"


def _pointwise_above(end: Node) -> Iterator[Node]:
    """The operations that a value is computed by, nearest first, up to products and what torch does not know."""
    pending, seen = [end], {end}
    while pending and len(seen) < NEAR:
        node = pending.pop(0)
        yield node
        if op_name(node) in ROOTS or not op_name(node).startswith(("aten.", "prims.", "_operator.")):
            continue
        above = [
            each for each in node.all_input_nodes if each not in seen and op_name(each) not in ("aten.mm", "aten.bmm")
        ]
        seen.update(above)
        pending += above
