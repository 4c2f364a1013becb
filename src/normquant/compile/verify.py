"""Check what the pass would do: each fused op beside the part of the graph that it replaced, on the same inputs.

The function is traced as `torch.compile` traces it, up to the graph that the pass sees; then the graph's operations run
one by one, eagerly, on this machine's device. Nothing is generated: what is compared is the arithmetic of the graph.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from normquant.compile.driver import run
from normquant.compile.find.graph import is_tensor, is_view
from normquant.compile.fusion_report import FusionReport
from normquant.compile.fusions.candidate import site_name
from normquant.compile.policy import Rules
from normquant.compile.recording import PASS, Recording, evaluate, evaluate_all, nodes_by_name, nodes_read, record

ALLOWED = 1e-5  # share of the values that may differ where the order of the sum of squares shows
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Tally:
    """How many values were compared, how many differ, and by how many steps of the format at most."""

    compared: int = 0
    differ: int = 0
    steps: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.compared + other.compared, self.differ + other.differ, max(self.steps, other.steps))


@dataclass(frozen=True)
class FusedSite:
    """One fused op and what it replaced.

    pairs: (name of the value before, name after) of everything that the rest of the graph reads from the op.
    roots: names of the values, in both graphs, that it computes from; weights are not among them.
    """

    name: str
    op: str
    pairs: tuple[tuple[str, str], ...]
    roots: tuple[str, ...]


@dataclass(frozen=True)
class Check:
    """The fused op of one site beside the graph that it replaced: fp8 values, scales, other outputs (sum, norm)."""

    name: str
    op: str
    values: Tally
    scales: Tally
    others: Tally

    @property
    def all(self) -> Tally:
        """Everything that was compared; its steps are those of the fp8 values."""
        together = self.values + self.scales + self.others
        return Tally(together.compared, together.differ, self.values.steps)


@dataclass(frozen=True)
class Checks:
    """Every site on the graph's own (random) inputs, and on inputs whose sum of squares is exact in fp32."""

    random: tuple[Check, ...]
    exact: tuple[Check, ...]

    @property
    def holds(self) -> bool:
        """Whether no value differs on the exact inputs, and at most 1e-5 of them on the random ones."""
        same, close = total(self.exact), total(self.random)
        return same.compared > 0 and same.differ == 0 and close.differ <= ALLOWED * close.compared


@dataclass(frozen=True)
class Verification:
    """unfused: what the model returns. fused: what it returns with every site fused. reports: of the fused graphs."""

    sites: tuple[Check, ...]
    unfused: Any
    fused: Any
    reports: tuple[FusionReport, ...]

    @property
    def exact(self) -> bool:
        """Whether at least one site was compared and no value of any site differs."""
        return bool(self.sites) and total(self.sites).differ == 0


def verify(
    fn: Callable[..., Any],
    *args: Any,
    kwargs: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    rules: Rules | None = None,
) -> Verification:
    """Run `fn(*args, **kwargs)` unfused and fused, and compare every fused op on the same inputs. Compiles nothing.

    The compiler's state in this process is reset. rules: which sites are fused; every one by default.
    """
    reports: list[FusionReport] = []

    def fuse(graph: Graph) -> None:
        reports.append(run(graph, rules or Rules("always"), strict=True))

    found = record(fn, args, {PASS: fuse}, kwargs, dynamic)
    sites = tuple(check for recording in found.recordings for check in check_sites(recording).random)
    return Verification(sites, found.before, found.after, tuple(reports))


def check_sites(recording: Recording, seed: int = 0) -> Checks:
    """Compare every site on the inputs of a recording, and on exact ones."""
    sites = find_sites(recording)
    with torch.no_grad():
        known = evaluate_all(recording.before, recording.inputs)
        random = tuple(_check(recording, site, known) for site in sites)
        exact = tuple(_check(recording, site, _exact_roots(site, known, seed)) for site in sites)
    return Checks(random, exact)


def total(checks: Iterable[Check]) -> Tally:
    """The sum of the checks."""
    return functools.reduce(operator.add, (check.all for check in checks), Tally())


def tally(expected: torch.Tensor, given: torch.Tensor) -> Tally:
    """Compare two tensors value by value; zeros of different sign differ by one step, all NaNs are one value.

    Raises ValueError where shape or dtype differ.
    """
    if expected.shape != given.shape or expected.dtype != given.dtype:
        raise ValueError(f"expected {tuple(expected.shape)} {expected.dtype}, got {tuple(given.shape)} {given.dtype}")
    a, b = _ordered(expected), _ordered(given)
    steps = (a - b).abs()
    differ = int((steps != 0).sum())
    return Tally(expected.numel(), differ, int(steps.max()) if differ else 0)


def compare(name: str, op: str, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Check:
    """The check of one site from the pairs (expected, given) of its outputs."""
    values, scales, others = Tally(), Tally(), Tally()
    for expected, given in pairs:
        found = tally(expected, given)
        if expected.dtype == torch.float8_e4m3fn:
            values += found
        elif expected.dtype in (torch.float32, torch.int32):
            scales += found
        else:
            others += found
    return Check(name, op, values, scales, others)


def find_sites(recording: Recording) -> tuple[FusedSite, ...]:
    """The ops that the pass put in, and the values that each of them took the place of."""
    before, after = nodes_by_name(recording.before), nodes_by_name(recording.after)
    pairs: dict[str, dict[tuple[str, str], None]] = {}
    for node in after.values():
        if not _survived(node, before):
            continue
        for old, new in zip(nodes_read(before[node.name]), nodes_read(node), strict=True):
            for fused in _fused_behind(new, before):
                pairs.setdefault(fused.name, {})[old.name, new.name] = None
    return tuple(_site(after[name], tuple(found), before) for name, found in pairs.items())


def _survived(node: Node, before: Mapping[str, Node]) -> bool:
    return node.name in before and before[node.name].target == node.target


def _fused_behind(node: Node, before: Mapping[str, Node]) -> list[Node]:
    """The fused ops that a value which the pass put in comes from."""
    if _survived(node, before):
        return []
    if str(node.target).startswith("normquant."):
        return [node]
    return list(dict.fromkeys(fused for arg in nodes_read(node) for fused in _fused_behind(arg, before)))


def _site(fused: Node, pairs: tuple[tuple[str, str], ...], before: Mapping[str, Node]) -> FusedSite:
    read = [arg for arg in nodes_read(fused) if is_tensor(arg) and arg.meta["val"].dim() > 1]
    roots = dict.fromkeys(root for arg in read for root in _roots(arg, before))
    return FusedSite(site_name(fused), str(fused.target).split(".")[1], pairs, tuple(roots))


def _roots(node: Node, before: Mapping[str, Node]) -> list[str]:
    """The values of the graph before the pass that `node` is a view or, where the pass put it in, a function of."""
    if not _survived(node, before):
        return [root for arg in nodes_read(node) if is_tensor(arg) for root in _roots(arg, before)]
    old = before[node.name]
    while is_view(old):
        old = nodes_read(old)[0]
    return [old.name]


def _exact_roots(site: FusedSite, known: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The known values, what the site reads being small integers over 8, whose squares add up in any order."""
    generator = torch.Generator().manual_seed(seed)
    replaced = dict(known)
    for root in site.roots:
        like = known[root]
        integers = torch.randint(-8, 9, tuple(like.shape), generator=generator)
        values = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
        replaced[root] = values.copy_(integers / 8)
    return replaced


def _check(recording: Recording, site: FusedSite, known: Mapping[str, Any]) -> Check:
    """Compare the values of one site; `known` holds values of the graph before the pass, its inputs among them."""
    before = nodes_by_name(recording.before)
    inputs = {name: known[name] for name in known if name in site.roots or before[name].op == "placeholder"}
    old, new = (dict.fromkeys(names) for names in zip(*site.pairs, strict=True))
    expected, given = evaluate(recording.before, old, inputs), evaluate(recording.after, new, inputs)
    return compare(site.name, site.op, ((expected[a], given[b]) for a, b in site.pairs))


def _ordered(values: torch.Tensor) -> torch.Tensor:
    """Each value's place among the numbers of its format, int64: neighbours are one apart, -0 below 0, NaN on top."""
    if not values.is_floating_point():
        return values.to(torch.int64)
    bits = values.contiguous().view(BITS[values.itemsize]).to(torch.int64)
    sign = 1 << (values.itemsize * 8 - 1)
    magnitude = bits & (sign - 1)
    place = torch.where(bits & sign != 0, -magnitude - 1, magnitude)
    return torch.where(values.float().isnan(), sign, place)
