"""Each fused op beside the part of the graph that it replaced, on the same inputs, value by value."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from normquant.demo.differences import Tally, tally
from normquant.demo.recorder import Recording, arguments, module_of, nodes_by_name

VIEWS = ("aten.reshape", "aten.view", "aten._unsafe_view", "aten.squeeze", "aten.unsqueeze", "aten.alias")
ALLOWED = 1e-5  # share of the values that may differ where the order of the sum of squares shows


@dataclass(frozen=True)
class Site:
    """One fused op and what it replaced.

    pairs: (name of the value before, name after) of everything that the rest of the graph reads from the op.
    roots: names of the values, in both graphs, that it computes from; weights are not among them.
    """

    name: str
    op: str
    fused: str
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
        total = self.values + self.scales + self.others
        return Tally(total.compared, total.differ, self.values.steps)


@dataclass(frozen=True)
class Checks:
    """Every site on the layer's own (random) inputs, and on inputs whose sum of squares is exact in fp32."""

    random: tuple[Check, ...]
    exact: tuple[Check, ...]

    @property
    def holds(self) -> bool:
        """Whether no value differs on the exact inputs, and at most 1e-5 of them on the random ones."""
        same, close = total(self.exact), total(self.random)
        return same.compared > 0 and same.differ == 0 and close.differ <= ALLOWED * close.compared


def total(checks: Iterable[Check]) -> Tally:
    """The sum of the checks."""
    return functools.reduce(operator.add, (check.all for check in checks), Tally())


def check_sites(recording: Recording, seed: int = 0) -> Checks:
    """Run both graphs of a recording on its inputs, then every site on exact ones."""
    sites = find_sites(recording)
    with torch.no_grad():
        known = _run_all(recording.before, recording.inputs)
        random = tuple(_check(recording, site, known) for site in sites)
        exact = tuple(_check(recording, site, _with_exact_roots(recording, site, seed)) for site in sites)
    return Checks(random, exact)


def find_sites(recording: Recording) -> tuple[Site, ...]:
    """The ops with a norm in them that the pass put in, and the values that each of them took the place of."""
    before, after = nodes_by_name(recording.before), nodes_by_name(recording.after)
    pairs: dict[str, dict[tuple[str, str], None]] = {}
    for node in after.values():
        if not _survived(node, before):
            continue
        for old, new in zip(arguments(before[node.name]), arguments(node), strict=True):
            if not _survived(new, before):
                for fused in _fused_behind(new, before):
                    pairs.setdefault(fused.name, {})[old.name, new.name] = None
    return tuple(_site(after[name], tuple(found), before) for name, found in pairs.items())


def outputs(recording: Recording) -> tuple[torch.Tensor, torch.Tensor]:
    """The function's first result from the graph before the pass and from the graph after it, both run eagerly."""
    with torch.no_grad():
        return tuple(Interpreter(m).run(*recording.inputs)[0] for m in (recording.before, recording.after))


def relative_error(output: torch.Tensor, exact: torch.Tensor) -> float:
    """||output - exact|| / ||exact||, Frobenius, in float64."""
    return float((output.double() - exact).norm() / exact.norm())


def _survived(node: Node, before: Mapping[str, Node]) -> bool:
    return node.name in before and before[node.name].target == node.target


def _fused_behind(node: Node, before: Mapping[str, Node]) -> list[Node]:
    """The fused ops that a value which the pass put in comes from."""
    if _survived(node, before):
        return []
    if _is_fused(node):
        return [node]
    return list(dict.fromkeys(fused for arg in arguments(node) for fused in _fused_behind(arg, before)))


def _is_fused(node: Node) -> bool:
    return str(node.target).startswith("normquant.") and "rms_norm" in str(node.target)


def _site(fused: Node, pairs: tuple[tuple[str, str], ...], before: Mapping[str, Node]) -> Site:
    roots = dict.fromkeys(root for arg in arguments(fused) if arg.meta["val"].dim() > 1 for root in _roots(arg, before))
    weight = next(arg for arg in arguments(fused) if arg.meta["val"].dim() == 1)
    users = before[weight.name].users if weight.name in before else ()
    name = next((module_of(user) for user in users), "") or fused.name
    return Site(name, str(fused.target).split(".")[1], fused.name, pairs, tuple(roots))


def _roots(node: Node, before: Mapping[str, Node]) -> list[str]:
    """The values of the graph before the pass that `node` is a view or, where the pass put it in, a function of."""
    if not _survived(node, before):
        return [root for arg in arguments(node) for root in _roots(arg, before)]
    old = before[node.name]
    while str(old.target).rpartition(".")[0] in VIEWS:
        old = next(arguments(old))
    return [old.name]


def _run_all(module: GraphModule, inputs: tuple[Any, ...]) -> dict[str, Any]:
    """Every value of the graph, by name."""
    interpreter = Interpreter(module, garbage_collect_values=False)
    interpreter.run(*inputs)
    return {node.name: value for node, value in interpreter.env.items()}


def _with_exact_roots(recording: Recording, site: Site, seed: int) -> dict[str, Any]:
    """The graph's inputs, and as what the site reads small integers over 8: their squares add up in any order."""
    before = nodes_by_name(recording.before)
    placeholders = [node.name for node in before.values() if node.op == "placeholder"]
    known = dict(zip(placeholders, recording.inputs, strict=True))
    generator = torch.Generator().manual_seed(seed)
    for root in site.roots:
        like = before[root].meta["val"]
        integers = torch.randint(-8, 9, tuple(like.shape), generator=generator)
        device = recording.inputs[0].device
        values = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
        known[root] = values.copy_(integers / 8)
    return known


def _check(recording: Recording, site: Site, known: dict[str, Any]) -> Check:
    """Compare the values of one site; `known` holds values of the graph before the pass, its inputs among them."""
    old_names, new_names = zip(*site.pairs, strict=True)
    inputs = {name: known[name] for name in known if name in site.roots or _is_input(recording, name)}
    expected = _evaluate(recording.before, old_names, inputs)
    given = _evaluate(recording.after, new_names, inputs)
    values, scales, others = Tally(), Tally(), Tally()
    for old, new in site.pairs:
        found = tally(expected[old], given[new])
        if expected[old].dtype == torch.float8_e4m3fn:
            values += found
        elif expected[old].dtype == torch.float32:
            scales += found
        else:
            others += found
    return Check(site.name, site.op, values, scales, others)


def _is_input(recording: Recording, name: str) -> bool:
    return nodes_by_name(recording.before)[name].op == "placeholder"


def _evaluate(module: GraphModule, names: Iterable[str], known: Mapping[str, Any]) -> dict[str, Any]:
    """The named values, computed from the known ones and nothing more than they need."""
    nodes = nodes_by_name(module)
    interpreter = Interpreter(module, garbage_collect_values=False)
    interpreter.env = {nodes[name]: value for name, value in known.items() if name in nodes}
    needed, pending = set(), [nodes[name] for name in names]
    while pending:
        node = pending.pop()
        if node not in needed and node not in interpreter.env:
            needed.add(node)
            pending.extend(arguments(node))
    for node in module.graph.nodes:
        if node in needed:
            interpreter.env[node] = interpreter.run_node(node)
    return {name: interpreter.env[nodes[name]] for name in names}
