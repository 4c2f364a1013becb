"""What a fusion finds: sites that it can rewrite, and sites that it knows and has to leave.

A fusion is a generator, `find(graph)`. It is asked for the next site only after the one before has been decided upon
and rewritten, and changes nothing itself: `fuse` and `native` of a candidate make new nodes when the driver calls them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, Node

from normquant.compile.edit.build import Builder, Rewrite
from normquant.compile.fusion_report import Site
from normquant.compile.measured import Strategy
from normquant.compile.policy import Decision, Facts
from normquant.distributed.group_facts import GroupFacts
from normquant.ops import OPS
from normquant.spec import QuantSpec

PACKAGE = Path(__file__).parents[2]
OURS = (PACKAGE, PACKAGE / "ops", PACKAGE / "linear")  # folders whose code a user did not write
Edit = Callable[[Builder], Rewrite]
FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')


@dataclass(frozen=True)
class Rejection:
    """The record of a site that stays as it is. lone: its quantization, where no norm is in front of that.
    told: its quantization, of which nothing more has to be said."""

    site: Site
    lone: Node | None = None
    told: Node | None = None


@dataclass(frozen=True)
class Candidate:
    """A site that can be rewritten.

    name, where: as its record has them. op, spec: what would take its place, on rows of k values like x.
    fuse, native: how to rewrite it; None where the fusion has no such strategy. traffic: bytes and launches for the
    record.
    opaque_norm, extra_kernel, group, own: as in `Facts`.
    stays: its record where it stays, if that is another one; a reason is put behind the one that it has.
    remark: said of the site in front of every other reason, and alone where the policy leaves it as it is.
    lone: its quantization, where no norm is in front of that, or its all-reduce. told: as in `Rejection`.
    listed: whether another fusion has recorded the site, so that no record is due where the policy leaves it as it is.
    """

    name: str
    where: str
    op: str
    x: torch.Tensor
    rows: Any
    k: int
    spec: QuantSpec | None
    fuse: Edit | None
    native: Edit | None = None
    traffic: Mapping[str, int] = field(default_factory=dict)
    opaque_norm: bool = False
    extra_kernel: bool = False
    group: GroupFacts | None = None
    stays: Site | None = None
    remark: str = ""
    lone: Node | None = None
    told: Node | None = None
    listed: bool = False
    own: Decision | None = None

    @property
    def facts(self) -> Facts:
        """What the policy decides by."""
        m = self.rows if isinstance(self.rows, int) else None
        return Facts(self.x.device, self.op, m, self.k, self.opaque_norm, self.extra_kernel, self.group, self.own)

    def rewrite(self, strategy: Strategy) -> Edit | None:
        """How to rewrite the site by a strategy, None where it stays."""
        return {"fused": self.fuse, "native": self.native, "stock": None}[strategy]

    def record(self, strategy: Strategy, *reasons: str) -> Site:
        """The record of the site, rewritten by a strategy or left as it is."""
        reason = "; ".join(filter(None, (self.remark, *reasons)))
        if strategy == "stock" and self.stays is not None:
            return replace(self.stays, reason=self.stays.reason + reason)
        spec, dtype = self.spec.encode() if self.spec else "", str(self.x.dtype).removeprefix("torch.")
        known: dict[str, Any] = {"spec": spec, "m": str(self.rows), "k": self.k, "dtype": dtype}
        if strategy == "fused":
            known |= {"op": self.op, **self.traffic}
        return Site(self.name, self.where, strategy, reason, **known)


Findings = Iterator[Candidate | Rejection]
Fusion = Callable[[Graph], Findings]


def rejected(
    name: str, where: str, reason: str, lone: Node | None = None, told: Node | None = None, **known: Any
) -> Rejection:
    """A site that stays. known: fields of its record."""
    return Rejection(Site(name, where, "stock", reason, **known), lone, told)


def bytes_of(op: str, *args: Any, **kwargs: Any) -> int:
    """The DRAM bytes that an op must move, read and written."""
    return sum(OPS[op].traffic(*args, **kwargs))


def rows_seen(rows: Any) -> int:
    """The number of rows that there were while compiling; 1 where no size was seen."""
    try:
        return int(rows if isinstance(rows, int) else rows.node.hint)
    except Exception:  # unbacked sizes have no hint and raise
        return 1


def module_path(node: Node) -> str:
    """`layers.3.input_layernorm` of the innermost module that made a node; "" where none did."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = re.sub(r"^[LG]\[['\"](\w+)['\"]\]", r"\1", str(list(stack.values())[-1][0]))  # dynamo's L['self'].layer
    path = re.sub(r"\[['\"]?(\w+)['\"]?\]", r".\1", path).replace("._modules.", ".")
    return re.sub(r"^self(\.|$)", "", path)


def site_name(*nodes: Node) -> str:
    """The module path of the first node that has one, or the name of the first node."""
    return next(filter(None, map(module_path, nodes)), nodes[0].name)


def source_line(*nodes: Node | None) -> str:
    """ "file:line" of the user's code that made the first node that knows it."""
    for node in nodes:
        trace = node.meta.get("stack_trace") if node is not None else None
        outside = [frame for frame in FRAME.findall(trace or "") if Path(frame[0]).parent not in OURS]
        if outside:
            return f"{outside[-1][0]}:{outside[-1][1]}"
    return "?"
