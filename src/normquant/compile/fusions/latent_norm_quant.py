"""Put the latents of multi-head latent attention into one op, as vLLM's MLA layer has them.

    x       = [q_a, kv_a, k_pe]                              [M, Q + C + R] bf16 or fp16, one projection
    q       = quantization of the RMSNorm of q_a             a site of the compile pass
    kv_norm = the RMSNorm of kv_a                            [M, C] like x
    k_rope  = the rotary position embedding of k_pe          [M, R] like x, aten operations

Where one of the three is missing nothing happens here, and q is left to the compile pass.
"""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.fx import Graph, Node

from normquant.compile.edit.build import Builder, Rewrite, as_row, as_rows, shaped
from normquant.compile.find.duplicates import Values
from normquant.compile.find.found import Match, Rejected, anchor_of
from normquant.compile.find.graph import (
    Columns,
    NotFound,
    Unsupported,
    aten,
    columns,
    dtype,
    is_tensor,
    is_view,
    value,
)
from normquant.compile.find.norm_ops import read_norm
from normquant.compile.find.norms import Norm
from normquant.compile.find.rotary import Rotation, check_cache, find_rotation, updates_cache
from normquant.compile.find.sites import find as find_sites
from normquant.compile.fusion_report import Site
from normquant.compile.fusions.acceptance import check_op, row_of, rows_of, sines_of
from normquant.compile.fusions.candidate import (
    Candidate,
    Findings,
    Rejection,
    bytes_of,
    rows_seen,
    site_name,
    source_line,
)
from normquant.compile.fusions.norm_quant import ask_input_for_shape, is_opaque, norm_name, op_spec, results_of
from normquant.spec import ACTIVATION_DTYPES, QuantSpec

NORM_NODES = 32  # how far behind kv_a its norm is looked for
Slices = list[tuple[Node, Columns]]


@dataclass(frozen=True)
class Latents:
    """The three parts of one row that the op can do. q: the site of q_a. base: x. kv: the norm of kv_a."""

    q: Match
    base: Node
    kv: Norm
    k_pe: Rotation

    @property
    def spec(self) -> QuantSpec:
        return op_spec(self.q, add=False)

    @property
    def taken(self) -> frozenset[Node]:
        """The nodes that the op takes the place of."""
        return self.q.inner | self.q.results | self.kv.inner | {self.kv.y} | self.k_pe.inner

    @property
    def inputs(self) -> tuple[Node, ...]:
        return self.base, self.q.norm.weight, self.kv.weight, self.k_pe.cache, self.k_pe.positions

    @property
    def readers(self) -> frozenset[Node]:
        """Who reads what the op makes."""
        made = (*self.q.results, self.kv.y, self.k_pe.y)
        return frozenset(user for node in made for user in node.users) - self.taken

    @property
    def position(self) -> Node:
        """The node that the op goes in front of, the first after its inputs that it takes the place of or that reads
        what it makes."""
        last = max(self.inputs)
        return min(node for node in self.taken | self.readers if node > last)


def find(graph: Graph) -> Findings:
    """Every site; one that stays is recorded by its norm of kv_a, since that of q_a is another fusion's."""
    for found in find_latents(graph):
        if isinstance(found, Rejected):
            yield Rejection(_left(found.norm, found.anchor, found.reason))
        else:
            yield _candidate(found)


def find_latents(graph: Graph) -> list[Latents | Rejected]:
    """Every tensor of which the first columns are normed and quantized, and the next ones normed."""
    slices = [(node, at) for node in graph.nodes if is_tensor(node) and (at := columns(node)) is not None]
    values, matches = Values(graph), find_sites(graph).matches
    times = Counter(match.norm.y for match in matches)
    found: list[Latents | Rejected] = []
    for match in matches:
        kv_a = _next_norm(match.norm, slices, values)
        if kv_a is None:
            continue
        try:
            if times[match.norm.y] > 1:
                raise Unsupported("the norm of q_a is quantized in more than one way")
            found.append(_read(match, *kv_a, slices, values.regions))
        except Unsupported as reason:
            found.append(Rejected(anchor_of(match), str(reason), kv_a[1]))
    return found


def _candidate(latents: Latents) -> Candidate:
    x, norm, anchor = value(latents.base), latents.q.norm, anchor_of(latents.q)
    rows = x.numel() // x.shape[-1]
    return Candidate(
        norm_name(latents.q),
        source_line(anchor, norm.y),
        "latent_norm_quant",
        x,
        rows,
        norm.k,
        latents.spec,
        fuse=partial(_fuse, latents),
        traffic=_traffic(latents, rows),
        opaque_norm=is_opaque(norm),
        stays=_left(latents.kv, anchor),
    )


def _left(kv: Norm | None, anchor: Node, reason: str = "") -> Site:
    """The norm of kv_a as a site that stays."""
    y = kv.y if kv is not None else anchor
    return Site(site_name(y), source_line(y), "stock", f"not in one kernel with the norm of q_a: {reason}")


def _next_norm(norm: Norm, slices: Slices, values: Values) -> tuple[Columns, Norm] | None:
    """Where a norm reads the first columns of a tensor: the columns after them that are normed too, and that norm."""
    q_a = columns(norm.x) if norm.x is not None else None
    if q_a is None or q_a.start != 0 or q_a.width != norm.k:
        return None
    for node, at in slices:
        kv = _norm_of(node, values) if (at.base, at.start) == (q_a.base, q_a.end) else None
        if kv is not None:
            return at, kv
    return None


def _norm_of(x: Node, values: Values) -> Norm | None:
    """The norm of x in the activation dtype."""
    pending, seen = [x], {x}
    while pending and len(seen) < NORM_NODES:
        for user in pending.pop(0).users:
            if user in seen or user.op != "call_function":
                continue
            seen.add(user)
            pending.append(user)
            norm = _read_norm(user, values)
            if norm is not None and norm.x is x and dtype(user) in ACTIVATION_DTYPES:
                return norm
    return None


def _read_norm(y: Node, values: Values) -> Norm | None:
    try:
        return read_norm(y, values) if is_tensor(y) else None
    except (NotFound, Unsupported):
        return None


def _read(match: Match, kv_a: Columns, kv: Norm, slices: Slices, regions: dict[Node, int]) -> Latents:
    """The site. Raises Unsupported where the op does not support it."""
    norm = match.norm
    if match.norms:
        raise Unsupported("the norm of q_a is also read by something else than its quantization")
    if isinstance(norm.eps, Node) or isinstance(kv.eps, Node) or norm.eps != kv.eps:
        raise Unsupported(f"the two norms have the epsilons {norm.eps} and {kv.eps}; the op has one")
    if norm.weight_offset or kv.weight_offset:
        raise Unsupported("a weight has an offset")
    if norm.rounding != kv.rounding:
        raise Unsupported(f"the norm of kv_a has rounding={kv.rounding!r}, that of q_a {norm.rounding!r}")
    latents = Latents(match, kv_a.base, kv, _rotation(kv_a, slices, op_spec(match, add=False)))
    _check_order(latents, regions)
    _check_inputs(latents)
    return latents


def _check_inputs(latents: Latents) -> None:
    """Raise Unsupported where the op does not accept what it would get."""
    q, kv, k_pe = latents.q.norm, latents.kv, latents.k_pe
    x, cache = rows_of(latents.base, value(latents.base).shape[-1]), value(k_pe.cache)
    angles = cache, sines_of(k_pe.cache, cache.shape[-1]), value(k_pe.positions)
    weights = row_of(q.weight, q.k), row_of(kv.weight, kv.k)
    check_op("latent_norm_quant", x, *weights, *angles, q.eps, k_pe.rope, latents.spec)


def _check_order(latents: Latents, regions: dict[Node, int]) -> None:
    """Raise Unsupported unless all three parts can be computed at one place."""
    last = max(latents.inputs)
    if any(reader < last for reader in latents.readers):
        raise Unsupported(f"{last.name}, which the op reads, is computed after a part of the latents was used")
    if len({regions[node] for node in latents.taken | {latents.position}}) > 1:
        raise Unsupported("a tensor is changed in place between the three parts")


def _rotation(kv_a: Columns, slices: Slices, spec: QuantSpec) -> Rotation:
    """The rotary embedding of the columns after kv_a. Raises Unsupported where there is none that the op supports."""
    x = value(kv_a.base)
    rest = Columns(kv_a.base, kv_a.end, x.shape[-1] - kv_a.end)
    copies = [node for node, at in slices if at == rest]
    if not copies:
        raise Unsupported("the columns after kv_a are not read as a whole")
    return _checked(find_rotation(copies, x.numel() // x.shape[-1], spec))


def _checked(rotation: Rotation) -> Rotation:
    """The rotation. Raises Unsupported where it is better left to someone else."""
    check_cache(rotation.cache)
    if any(map(updates_cache, _readers(rotation.y))):
        raise Unsupported("vLLM puts the rotary embedding into its update of the kv cache (fuse_rope_kvcache_cat_mla)")
    return rotation


def _readers(node: Node) -> list[Node]:
    """Who reads a node, through views."""
    return [reader for user in node.users for reader in ([user, *_readers(user)] if is_view(user) else [user])]


def _fuse(latents: Latents, new: Builder) -> Rewrite:
    """The op, whose outputs go to the readers of the three parts."""
    q, kv, k_pe = latents.q, latents.kv, latents.k_pe
    r = value(k_pe.cache).shape[-1]
    with new.before(latents.position):
        x = as_rows(new, latents.base, value(latents.base).shape[-1])
        weights = as_row(new, q.norm.weight, q.norm.k), as_row(new, kv.weight, kv.k)
        sin = new(aten.slice.Tensor, k_pe.cache, 1, r // 2, r)
        args = (x, *weights, k_pe.cache, sin, k_pe.positions, q.norm.eps, k_pe.rope, latents.spec.encode())
        op = new(torch.ops.normquant.latent_norm_quant.default, *args)
        outputs = [new(operator.getitem, op, i) for i in range(4)]
        replaced = results_of(q, outputs[:2], None, None, new)
        replaced += [(old, shaped(new, made, old)) for old, made in ((kv.y, outputs[2]), (k_pe.y, outputs[3]))]
    return Rewrite(tuple(replaced), ask_input_for_shape(q, q.norm.sources[0], new), like=q.norm.y)


def _traffic(latents: Latents, rows: Any) -> dict[str, int]:
    """The bytes that the op has to move, and what that saves.

    The comparison is with both norms in one generated kernel, a kernel for the quantization, and one for the rotary
    embedding.
    """
    q, m, r = latents.q.norm, rows_seen(rows), value(latents.k_pe.cache).shape[-1]
    return {
        "bytes_moved": bytes_of("latent_norm_quant", m, q.k, latents.spec, latent=(latents.kv.k, r)),
        "bytes_saved": m * q.k * q.dtype.itemsize * 2,  # the norm of q_a is neither written nor read
        "kernels_saved": 2,
    }
