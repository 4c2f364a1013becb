"""Nodes that compute the same value again."""

from __future__ import annotations

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from normquant.compile.find.duplicates import equal_nodes
from normquant.compile.find.graph import mutation_regions

aten = torch.ops.aten


def equal(fn, *args):
    """The targets of the nodes of fn's graph that have an equal, in order."""
    graph = make_fx(fn, tracing_mode="fake")(*args).graph
    found = equal_nodes(graph, mutation_regions(graph))
    assert all(nodes == sorted(nodes) and node in nodes for node, nodes in found.items())
    return [node.target for node, nodes in found.items() if len(nodes) > 1]


X = torch.randn(4, 8)


def test_the_same_operations_on_the_same_values_are_equal() -> None:
    assert equal(lambda x: (x.exp().view(8, 4), x.exp().view(8, 4)), X) == [aten.exp.default, aten.view.default] * 2
    assert equal(lambda x: x.max(-1)[0] + x.max(-1)[1], X).count(aten.max.dim) == 2


def test_other_arguments_make_other_values() -> None:
    def fn(x):
        return x * 2, x * 2.0, x.add(x, alpha=2), x.add(x), x.sum(0), x.sum(1), x.exp() * 3, x.log() * 3

    assert equal(fn, X) == []


def test_what_is_random_or_undefined_is_equal_to_nothing() -> None:
    assert equal(lambda x: (torch.rand_like(x), torch.rand_like(x), torch.empty_like(x), torch.empty_like(x)), X) == []


def test_what_is_changed_in_place_is_equal_to_nothing() -> None:
    def between(x):
        first = x.exp()
        x.mul_(2)
        return first, x.exp()

    def through_a_view(x):
        first, second = x.exp(), x.exp()
        first.view(-1).mul_(2)
        return first, second

    assert equal(between, X) == [] and equal(through_a_view, X) == []


def test_a_copy_into_an_input_leaves_its_source_alone() -> None:
    def fn(x):
        first, second = x.exp(), x.exp()
        x.copy_(first)
        return second

    assert equal(fn, X) == [aten.exp.default] * 2
