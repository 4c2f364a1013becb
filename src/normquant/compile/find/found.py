"""What was found in a graph: a norm and its quantizations that can be one op, or a quantization and why it stays."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from normquant.compile.find.norms import Norm
from normquant.compile.find.quants import Quant
from normquant.spec import QuantSpec


@dataclass(frozen=True)
class Match:
    """A site that the kernels can do.

    same: the norm, as often as the graph computes it.
    spec: the arithmetic of norm and quantization together.
    norms: the nodes that hold the norm, in the activation dtype, for readers outside of the site; empty without any.
    """

    same: tuple[Norm, ...]
    quants: tuple[Quant, ...]
    spec: QuantSpec
    norms: tuple[Node, ...] = ()

    @property
    def norm(self) -> Norm:
        return self.same[0]

    @property
    def ys(self) -> tuple[Node, ...]:
        """The nodes that hold the norm as it is quantized."""
        return tuple(norm.y for norm in self.same)

    @property
    def sums(self) -> tuple[Node, ...]:
        """The nodes that hold the sum that the norm reads, in the activation dtype."""
        return tuple(node for norm in self.same if norm.addition for node in norm.addition.stored)

    @property
    def inner(self) -> frozenset[Node]:
        """The nodes that are gone once the site is one op."""
        return frozenset[Node]().union(*(norm.inner for norm in self.same), *(quant.inner for quant in self.quants))

    def copies_scale(self, quant: Quant) -> bool:
        """Whether an opaque quantization has its scales in another layout than the op makes them in."""
        return quant.scale is not None and quant.scale_form is None and quant.spec.layout != self.spec.layout

    @property
    def results(self) -> frozenset[Node]:
        nodes = {node for quant in self.quants for node in (quant.data, quant.scale) if node is not None}
        return frozenset(nodes | set(self.norms) | set(self.ys))


@dataclass(frozen=True)
class Rejected:
    """A site that stays as it is. anchor: its quantization. norm: where it was read."""

    anchor: Node
    reason: str
    norm: Norm | None = None


def anchor_of(match: Match) -> Node:
    quant = match.quants[0]
    return quant.data or quant.scale or quant.y
