"""Nodes that compute the same value again."""

from __future__ import annotations

import operator

import pytest
import torch
from torch.fx import Graph
from torch.fx.experimental.proxy_tensor import make_fx

from normquant.compile.find.duplicates import Values, equal_nodes
from normquant.compile.find.graph import mutation_regions

aten = torch.ops.aten


def equal(fn, *args):
    """The targets of the nodes of fn's graph that have an equal, in order."""
    graph = make_fx(fn, tracing_mode="fake")(*args).graph
    found = equal_nodes(graph, mutation_regions(graph))
    assert all(nodes == sorted(nodes) and node in nodes for node, nodes in found.items())
    return [node.target for node, nodes in found.items() if len(nodes) > 1]


def traced(fn, *args):
    """fn's graph, its calls by the names of their operations."""
    graph = make_fx(fn, tracing_mode="fake")(*args).graph
    return graph, {name: graph.find_nodes(op="call_function", target=target) for name, target in TARGETS.items()}


TARGETS = {"exp": aten.exp.default, "log": aten.log.default, "view": aten.view.default}
X = torch.randn(4, 8)


def test_the_same_operations_on_the_same_values_are_equal() -> None:
    assert equal(lambda x: (x.exp().view(8, 4), x.exp().view(8, 4)), X) == [aten.exp.default, aten.view.default] * 2
    assert equal(lambda x: x.max(-1)[0] + x.max(-1)[1], X).count(aten.max.dim) == 2


def test_other_arguments_make_other_values() -> None:
    def fn(x):
        return x * 2, x * 2.0, x.add(x, alpha=2), x.add(x), x.sum(0), x.sum(1), x.exp() * 3, x.log() * 3

    assert equal(fn, X) == []


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        (({"a": 1}, {"a": 2}), ({}, {})),
        (((2,), (2.0,)), ({}, {})),
        (((1,), (True,)), ({}, {})),
        (((), ()), ({"scale": 1.0}, {"scale": 2.0})),
        (((), ()), ({"scale": 1}, {"scale": 1.0})),
        (((), ()), ({"scale": [1]}, {"scale": [2]})),
        (((), ()), ({"scale": None}, {"scale": "None"})),
    ],
    ids=str,
)
def test_arguments_of_other_values_types_or_names_are_others(args, kwargs) -> None:
    graph = Graph()
    x = graph.placeholder("x")
    for arg, named in zip(args, kwargs, strict=True):
        for _ in range(2):
            graph.call_function(aten.exp.default, (x, arg), named)
    regions = dict.fromkeys(graph.nodes, 0)
    _, a, same_as_a, b, same_as_b = graph.nodes
    found = equal_nodes(graph, regions)
    assert found[a] == [a, same_as_a] and found[b] == [b, same_as_b]


def test_arguments_by_name_are_compared_by_their_values() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    first, second, other = (graph.call_function(op, (x,)) for op in (aten.exp.default,) * 2 + (aten.log.default,))
    readers = [graph.call_function(aten.neg.default, (), {"input": node}) for node in (first, second, other)]
    found = equal_nodes(graph, dict.fromkeys(graph.nodes, 0))
    assert found[readers[0]] == readers[:2] and found[readers[2]] == readers[2:]


def test_what_is_no_operation_of_torch_is_equal_to_nothing() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    calls = [graph.call_function(torch.exp, (x,)) for _ in range(2)] + [graph.call_method("exp", (x,))]
    parameters = [graph.get_attr("weight"), graph.get_attr("weight")]
    items = [graph.call_function(operator.getitem, (x, 0)) for _ in range(2)]
    found = equal_nodes(graph, dict.fromkeys(graph.nodes, 0))
    assert not found.keys() & {x, *calls, *parameters} and found[items[0]] == items


def test_values_are_those_of_the_graph() -> None:
    def fn(x):
        y, z = x.exp(), x.exp()
        return y.log(), z.log(), x.log(), y.view(-1), x.mul_(2)

    graph, nodes = traced(fn, X.clone())
    values = Values(graph)
    (y, z), (log_y, log_z, log_x), (view,) = nodes["exp"], nodes["log"], nodes["view"]
    assert values.graph is graph and values.regions == mutation_regions(graph)
    assert values.same(y, z) and values.same(z, y) and values.same(y, y) and values.same(log_y, log_z)
    (x,) = graph.find_nodes(op="placeholder")
    assert values.same(x, x), "also what no operation makes"
    assert not any(values.same(*pair) for pair in ((y, log_y), (log_y, log_x), (y, view), (view, y), (x, y), (y, x)))


def test_random_values_are_only_the_same_as_themselves() -> None:
    graph, _ = traced(lambda x: (torch.rand_like(x), torch.rand_like(x)), X)
    first, second = (node for node in graph.nodes if node.op == "call_function")
    values = Values(graph)
    assert values.same(first, first) and not values.same(first, second)


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

    def through_two_views(x):
        first, second = x.exp(), x.exp()
        first.view(-1).view(2, 16).mul_(second.view(2, 16))
        return first, second

    def in_a_list(x):
        first, second = x.exp(), x.exp()
        torch._foreach_mul_([x, first], 2)
        return first, second

    def views_in_a_list(x):
        first, second, other = x.exp(), x.exp(), x.log()
        torch._foreach_mul_([first.view(-1), other.view(-1)], 2)
        return first, second, other

    for fn in (between, through_a_view, through_two_views, in_a_list, views_in_a_list):
        assert equal(fn, X.clone()) == [], fn


def test_what_a_changed_tensor_was_made_of_keeps_its_equals() -> None:
    def fn(x):
        first, second = x.exp(), x.exp()
        first.log().mul_(2)
        return first, second

    assert equal(fn, X) == [aten.exp.default] * 2


def test_a_copy_into_an_input_leaves_its_source_alone() -> None:
    def fn(x):
        first, second = x.exp(), x.exp()
        x.copy_(first)
        return second

    assert equal(fn, X) == [aten.exp.default] * 2
