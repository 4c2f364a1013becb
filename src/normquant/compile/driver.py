"""The pass as Inductor runs it: find the sites of a graph, decide, rewrite, report."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

from normquant import ops, spec
from normquant.compile import report
from normquant.compile.edit.cleanup import clean
from normquant.compile.edit.decompose import decompose
from normquant.compile.find.graph import Unsupported, dtype, value
from normquant.compile.find.norm_ops import is_norm_op
from normquant.compile.find.quant_ops import is_quant, quantized
from normquant.compile.find.sites import Match, Rejected, anchor_of, find
from normquant.compile.fusions.norm_quant import Rewriter, fused_op, fused_op_name, in_memory, op_spec
from normquant.compile.policy import Facts, Rules
from normquant.compile.report import FusionReport, Site
from normquant.ops import OPS

SOURCES = (
    *sorted(map(str, Path(__file__).parent.rglob("*.[pj][ys]*"))),
    spec.__file__,
    *sorted(map(str, Path(ops.__file__).parent.glob("*.py"))),
)
FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')


class NormQuantPass(CustomGraphPass):
    """Fuses the norm -> quant sites of the graphs that Inductor compiles; for `post_grad_custom_pre_pass`.

    strict: let an exception of the pass end the compile; else the graph is compiled as it was and the report says why.
    """

    def __init__(self, rules: Rules | None = None, strict: bool = False) -> None:
        self.rules = rules or Rules()
        self.strict = strict

    def uuid(self) -> Any:
        """Changes with the sources of the pass and with every option, so that compile caches miss when they should."""
        return get_hash_for_files(SOURCES, extra=repr((self.rules.key(), self.strict)))

    def __call__(self, graph: Graph) -> None:
        try:
            outcome = run(graph, self.rules, self.strict)
        except Exception as error:
            if self.strict:
                raise
            outcome = FusionReport(0, self.rules.policy, (), error=f"{type(error).__name__}: {error}")
            graph.eliminate_dead_code()
        report.add(outcome)


def run(graph: Graph, rules: Rules, strict: bool = False) -> FusionReport:
    """Rewrite the graph and say what was done. A site whose rewrite fails stays as it was, unless strict."""
    found = find(graph)
    rewriter = Rewriter(graph)
    sites = [_rejected_site(rejected) for rejected in found.rejected]
    sites += [_treat(match, rewriter, rules, strict) for match in found.matches]
    others = tuple(_treat_other(other, graph, rules) for other in found.others)
    cleaned = 0
    if any(site.strategy != "stock" for site in (*sites, *others)):
        graph.eliminate_dead_code()
        cleaned = clean(graph)
        rewriter.keep_outputs_apart()
    return FusionReport(0, rules.policy, tuple(sites), others, cleaned)


def _treat_other(other: Rejected, graph: Graph, rules: Rules) -> Site:
    """A quantization without a norm: there is nothing to fuse, but an opaque one can become aten operations."""
    site = _rejected_site(other)
    if not is_quant(other.anchor):
        return site
    x = value(quantized(other.anchor))
    k = x.shape[-1]
    facts = Facts(x.device, "group_quant", None, k if isinstance(k, int) else 0, False)
    decision = rules.decide(site.name, facts)
    if decision.strategy != "native":
        return site
    try:
        decompose(graph, [other.anchor])
    except Unsupported as reason:
        return replace(site, reason=f"{site.reason}; {reason}")
    return replace(site, strategy="native", reason=f"{site.reason}; {decision.reason}")


def _treat(match: Match, rewriter: Rewriter, rules: Rules, strict: bool) -> Site:
    norm = match.norm
    name, where = site_name(match), source_line(anchor_of(match), norm.y)
    x = value(norm.sources[0])
    rows = x.numel() // norm.k
    m = rows if isinstance(rows, int) else None
    add = rewriter.adds(match)
    facts: dict[str, Any] = {
        "spec": op_spec(match, add).encode(),
        "m": str(rows),
        "k": norm.k,
        "dtype": str(norm.dtype)[6:],
    }
    op_name = fused_op(match, add)._opname
    opaque_norm = any(is_norm_op(node) for node in (norm.y, *norm.inner))
    decision = rules.decide(name, Facts(x.device, op_name, m, norm.k, opaque_norm, _takes_extra_kernel(match)))
    if decision.strategy == "stock":
        return Site(name, where, "stock", decision.reason, **facts)
    try:
        if decision.strategy == "native":
            return Site(name, where, "native", _make_native(match, rewriter, decision.reason), **facts)
        rewriter.fuse(match)
    except Unsupported as reason:
        return Site(name, where, "stock", str(reason), **facts)
    except Exception as error:
        if strict:
            raise
        return Site(name, where, "stock", f"the rewrite failed: {type(error).__name__}: {error}", **facts)
    return Site(name, where, "fused", decision.reason, op=op_name, **facts, **_traffic(match, add, rows))


def _takes_extra_kernel(match: Match) -> bool:
    """Whether the weight is computed in the graph, and nothing opaque in the site has a kernel that goes in return."""
    computed = match.norm.weight.op == "call_function" and not in_memory(match.norm.weight)
    return computed and not any(is_quant(node) for node in match.inner)


def _make_native(match: Match, rewriter: Rewriter, reason: str) -> str:
    """Turn the opaque quantizations of a site into aten operations; returns the reason for the report."""
    inside = {node for quant in match.quants for node in quant.inner if is_quant(node)}
    ops = [node for node in rewriter.graph.nodes if node in inside]
    if ops:
        decompose(rewriter.graph, ops)
    return f"{reason}; {'the quantization is aten operations now' if ops else 'it was aten operations already'}"


def _traffic(match: Match, add: bool, rows: Any) -> dict[str, Any]:
    """The bytes that one kernel has to move, and what that saves.

    The comparison is with the norm as one generated kernel that writes its result, and a kernel for each quantization
    that reads it.
    """
    norm, spec = match.norm, match.spec
    m = rows if isinstance(rows, int) else hint(rows)
    tensor = m * norm.k * norm.dtype.itemsize
    op = OPS[fused_op_name(match, add)]
    read, written = op.traffic(m, norm.k, spec, weight_bytes=dtype(norm.weight).itemsize)
    saved = tensor * (len(match.quants) + (0 if match.norms else 1)) + spec.bytes(m, norm.k) * (len(match.quants) - 1)
    kernels = len(match.quants) - sum(map(match.copies_scale, match.quants))
    return {"bytes_moved": read + written, "bytes_saved": saved, "kernels_saved": kernels}


def hint(size: Any) -> int:
    """The value that a symbolic size had while compiling, 1 where there is none."""
    try:
        return int(size.node.hint)
    except Exception:  # unbacked sizes have no hint and raise
        return 1


def _rejected_site(rejected: Rejected) -> Site:
    norm = rejected.norm
    y = norm.y if norm else None
    facts: dict[str, Any] = {"k": norm.k, "dtype": str(norm.dtype)[6:]} if norm else {}
    name = module_path(y) if y is not None else module_path(rejected.anchor)
    return Site(name or rejected.anchor.name, source_line(rejected.anchor, y), "stock", rejected.reason, **facts)


def site_name(match: Match) -> str:
    """The norm's module path, or the name of its node where no module made it."""
    nodes = [match.norm.y, *match.norm.inner]
    return next((path for path in map(module_path, nodes) if path), match.norm.y.name)


def module_path(node: Node) -> str:
    """`layers.3.input_layernorm` of the innermost module that made a node."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = re.sub(r"^[LG]\[['\"](\w+)['\"]\]", r"\1", str(list(stack.values())[-1][0]))  # dynamo's L['self'].layer
    path = re.sub(r"\[['\"]?(\w+)['\"]?\]", r".\1", path).replace("._modules.", ".")
    return re.sub(r"^self(\.|$)", "", path)


def source_line(*nodes: Node | None) -> str:
    """ "file:line" of the user's code that made the first node that knows it."""
    for node in nodes:
        trace = node.meta.get("stack_trace") if node is not None else None
        frames = FRAME.findall(trace or "")
        outside = [frame for frame in frames if Path(frame[0]).parent.parent != Path(__file__).parent.parent.parent]
        if outside:
            return f"{outside[-1][0]}:{outside[-1][1]}"
    return "?"
