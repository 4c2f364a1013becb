"""Which strategy a site gets: `fused`, our kernel; `native`, aten operations for Inductor; `stock`, untouched."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal, get_args

import torch

from normquant.compile.measured import Strategy, StrategyTable, measured
from normquant.distributed.group_facts import GroupFacts

Policy = Literal["auto", "always", "never", "native", "opaque-norm"]
Products = Literal["auto", "always", "never"]
BY_POLICY: dict[str, Strategy] = {
    "always": "fused",
    "never": "stock",
    "native": "native",
    "fused": "fused",
    "stock": "stock",
}
REMEDY = "`normquant tune --strategies` makes them, policy='always' fuses anyway"
SM90_RULE = "no measurement of this shape; our kernel was the fastest in nearly all that were measured on sm_90"
# Ops that no GPU has run yet: neither the rule nor the remedy is about them.
UNMEASURED = frozenset({"gated_norm_quant"})


@dataclass(frozen=True)
class Decision:
    strategy: Strategy
    reason: str


@dataclass(frozen=True)
class Facts:
    """What a decision may depend on.

    m: rows, None where they are symbolic. opaque_norm: the norm is one operation that the compiler calls.
    extra_kernel: fusing takes a kernel that the site does not have now, for a weight that the graph computes.
    group: whose ranks compute it together, None for one GPU alone.
    own: for a product and its reader, which have measurements of their own, what those say.
    """

    device: torch.device
    op: str
    m: int | None
    k: int
    opaque_norm: bool
    extra_kernel: bool = False
    group: GroupFacts | None = None
    own: Decision | None = None


@dataclass(frozen=True, eq=False)
class Rules:
    """policy: for every site that `sites` does not name. sites: glob of a site's name -> strategy or policy; the first
    that matches counts. table: path of a measured table that is used instead of the package's own. It is read once,
    here: a table that cannot be read is found now, not in the middle of a compile. products: whether a block-FP8
    product and the kernel that reads it become one op, which may split the product: where that was measured to be the
    fastest, always, or never; with policy "never" never, and `sites` plays no part. A split product is added up in
    another order, which changes last bits.

    Rules are equal where they decide alike.
    """

    policy: Policy = "auto"
    sites: Mapping[str, str] = field(default_factory=dict)
    table: str | None = None
    products: Products = "auto"
    measurements: StrategyTable | None = field(init=False)

    def __post_init__(self) -> None:
        _accepted("policy", self.policy, get_args(Policy))
        for pattern, choice in self.sites.items():
            _accepted(f"sites[{pattern!r}]", choice, (*get_args(Strategy), *get_args(Policy)))
        _accepted("products", self.products, get_args(Products))
        content = None if self.table is None else StrategyTable.load(self.table)
        object.__setattr__(self, "measurements", content)

    @property
    def identity(self) -> Hashable:
        """Everything that decisions depend on besides the graph, the hardware and the package itself."""
        # the order of sites counts
        return self.policy, tuple(self.sites.items()), self.measurements, self.products

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rules) and self.identity == other.identity

    def __hash__(self) -> int:
        return hash(self.identity)

    def decide(self, name: str, facts: Facts) -> Decision:
        """The strategy of a site that can be fused."""
        if facts.own is not None:
            return self._product(facts.own)
        for pattern, choice in self.sites.items():
            if fnmatchcase(name, pattern):
                return self._by(choice, f"{choice} for {pattern!r}", facts)
        return self._by(self.policy, f"policy {self.policy}", facts)

    def _product(self, measured: Decision) -> Decision:
        if "never" in (self.policy, self.products):
            return Decision("stock", f"policy {self.policy}, products {self.products}")
        return Decision("fused", "products always") if self.products == "always" else measured

    def _by(self, choice: str, reason: str, facts: Facts) -> Decision:
        if choice == "auto":
            return self._automatic(facts)
        if choice == "opaque-norm":
            if facts.opaque_norm:
                return Decision("fused", f"{reason}: the norm is one opaque operation")
            return Decision("stock", f"{reason}: no norm in it is one opaque operation")
        return Decision(BY_POLICY[choice], reason)

    def _automatic(self, facts: Facts) -> Decision:
        """The fastest strategy where it was measured, the rule for hardware that was, and stock everywhere else."""
        device = facts.device
        if facts.extra_kernel:
            return Decision("stock", "policy auto: the graph computes the weight or copies the input, one more kernel")
        if device.type != "cuda" or torch.version.hip:
            kind = "ROCm" if torch.version.hip else device.type
            return Decision("stock", f"policy auto: no measurements on {kind}; policy='always' fuses anyway")
        if facts.group is not None:
            if unmeasured := facts.group.unmeasured(facts.k, facts.m):
                return Decision("stock", f"policy auto: {unmeasured}")
            return Decision("fused", f"measured: faster than an all-reduce and the rest on {facts.group.ranks} ranks")
        capability = torch.cuda.get_device_capability(device)
        table = measured(capability) if self.measurements is None else self.measurements
        lacks = f"on sm_{capability[0]}{capability[1]}"
        if table is not None and table.capability == capability:
            found = table.fastest(facts.op, facts.k, facts.m)
            if found is not None:
                return Decision(*found)
            lacks = f"of {facts.op} with K={facts.k} {lacks}"
        if facts.op in UNMEASURED:
            return Decision(
                "stock", f"policy auto: {facts.op} was measured on no GPU yet; policy='always' fuses anyway"
            )
        if capability == (9, 0):
            return Decision("fused", f"policy auto: {SM90_RULE}")
        return Decision("stock", f"policy auto: no measurements {lacks}; {REMEDY}")


def _accepted(what: str, given: str, accepted: tuple[str, ...]) -> None:
    if given not in accepted:
        raise ValueError(f"{what} is {given!r}; accepted: {', '.join(map(repr, accepted))}")
