"""New nodes, and handing them to the readers of the old ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from normquant.compile.edit.build import (
    COPIED_META,
    Builder,
    Rewrite,
    as_row,
    as_rows,
    call_in_place_of,
    laid_out,
    rebuild,
    shape_arg,
    shaped,
)
from normquant.compile.find.axes import Axis
from normquant.compile.find.graph import aten, value

G, ROWS = Axis("g", 4), Axis("m", None)
X = torch.arange(24.0).view(2, 3, 4)


def traced(fn, *args: Any, mode: str = "fake") -> tuple[Graph, list[Node]]:
    """The graph of fn and its calls."""
    graph = make_fx(fn, tracing_mode=mode)(*args).graph
    return graph, [node for node in graph.nodes if node.op == "call_function"]


def result(graph: Graph, *args: Any) -> Any:
    graph.lint()
    return GraphModule(torch.nn.Module(), graph)(*args)


def names(graph: Graph) -> list[str]:
    return [node.name for node in graph.nodes]


def test_a_node_has_the_fake_value_that_it_makes() -> None:
    graph, (exp,) = traced(torch.exp, X)
    new = Builder(graph)
    with new.before(exp):
        made = new(aten.sum.dim_IntList, exp.args[0], [0], keepdim=True)
    assert made.meta["val"].shape == (1, 3, 4) and made.meta["val"].fake_mode is exp.meta["val"].fake_mode
    assert (made.target, made.args, dict(made.kwargs)) == (
        aten.sum.dim_IntList, (exp.args[0], [0]), {"keepdim": True},
    )  # fmt: skip
    assert new.made == [made] and list(graph.nodes).index(made) == list(graph.nodes).index(exp) - 1


def test_what_an_operation_refuses_leaves_no_node() -> None:
    graph, (exp,) = traced(torch.exp, X)
    new, before = Builder(graph), names(graph)
    with new.before(exp), pytest.raises(RuntimeError):
        new(aten.view.default, exp.args[0], [5, 5])
    assert names(graph) == before and new.made == []


def test_what_was_made_can_be_taken_out_again() -> None:
    graph, (exp,) = traced(torch.exp, X)
    new, before = Builder(graph), names(graph)
    with new.before(exp):
        new(aten.neg.default, new(aten.neg.default, exp.args[0]))
    assert len(names(graph)) == len(before) + 2
    new.erase()
    assert names(graph) == before and new.made == []


def test_a_value_that_is_no_fake_tensor_is_computed_as_it_is() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.ones(2)
    assert torch.equal(Builder(graph)(aten.add.Tensor, x, 2).meta["val"], torch.full((2,), 3.0))


def rewrite_of(fn) -> tuple[Graph, list[Node], Node]:
    """A graph with three calls, and a new node, which doubles its input."""
    graph, calls = traced(fn, X)
    new = Builder(graph)
    with new.before(calls[0]):
        doubled = new(aten.mul.Tensor, next(iter(graph.nodes)), 2)
    return graph, calls, doubled


def chain(x):
    y = x.exp()
    return y.log(), y.neg()


def test_the_readers_of_an_old_node_read_the_new_one() -> None:
    graph, (exp, log, neg), doubled = rewrite_of(chain)
    Rewrite(replaced=((exp, doubled),)).commit([doubled])
    assert log.args == neg.args == (doubled,) and exp in graph.nodes and not exp.users
    assert torch.equal(result(graph, X)[1], -2 * X)


def test_one_reader_can_be_redirected() -> None:
    _, (exp, log, neg), doubled = rewrite_of(chain)
    Rewrite(redirected=((neg, exp, doubled),)).commit([doubled])
    assert log.args == (exp,) and neg.args == (doubled,)


def test_new_nodes_come_from_where_the_old_ones_did() -> None:
    _, (exp, log, _), doubled = rewrite_of(chain)
    for key in COPIED_META:
        log.meta.pop(key, None)
    log.meta |= {"stack_trace": "line 3", "seq_nr": 7, "partitioner_tag": "is_forward"}
    Rewrite(replaced=((exp, doubled),), like=log).commit([doubled])
    assert doubled.meta["stack_trace"] == "line 3" and doubled.meta["seq_nr"] == 7
    assert "partitioner_tag" not in doubled.meta and doubled.meta["val"].shape == X.shape
    Rewrite().commit([doubled])
    assert doubled.meta["seq_nr"] == 7, "nothing to take over"


def test_strides_that_are_free_from_now_on_are_forgotten() -> None:
    _, (exp, log, neg), doubled = rewrite_of(chain)
    for node in (exp, log):
        node.meta["eager_input_vals"] = ((), {})
    Rewrite(free_strides=(log, neg)).commit([doubled])
    assert "eager_input_vals" not in log.meta and "eager_input_vals" in exp.meta


def test_dead_nodes_that_seem_to_have_effects_are_erased_unless_they_are_read() -> None:
    graph, (exp, log, neg), doubled = rewrite_of(chain)
    Rewrite(replaced=((exp, doubled),), erased=(exp, neg)).commit([doubled])
    assert exp not in list(graph.nodes) and neg in list(graph.nodes) and log in list(graph.nodes)


@pytest.mark.parametrize("at", ["redirected", "replaced", "committed"])
def test_a_rewrite_that_fails_changes_nothing(at: str) -> None:
    graph, (exp, log, neg), doubled = rewrite_of(chain)
    log.meta["eager_input_vals"] = ((), {})
    before = [(node, node.args, dict(node.meta)) for node in graph.nodes]
    told: list[str] = []

    def fails() -> None:
        told.append("committed")
        raise RuntimeError("refused")

    rewrite = Rewrite(
        replaced=((exp, doubled),) if at != "replaced" else ((exp, doubled), (None, doubled)),  # type: ignore[arg-type]
        redirected=((neg, exp, doubled),) if at != "redirected" else ((neg, exp, doubled), (None, exp, doubled)),  # type: ignore[arg-type]
        free_strides=(log,),
        like=exp,
        committed=fails,
        erased=(exp,),
    )
    if at == "committed":
        with pytest.raises(RuntimeError, match="refused"):
            rewrite.commit([doubled])
        assert told == ["committed"]
        after = [(node, node.args, dict(node.meta)) for node in graph.nodes]
        assert [row[:2] for row in after] == [row[:2] for row in before]
        assert log.meta["eager_input_vals"] == ((), {})
    else:
        with pytest.raises(AttributeError):
            rewrite.commit([doubled])
        assert log.args == neg.args == (exp,) and told == []


@pytest.mark.parametrize("what", ["replaced", "redirected", "free_strides"])
def test_all_that_a_failing_rewrite_changed_is_put_back(what: str) -> None:
    _, (exp, log, neg), doubled = rewrite_of(chain)
    for node in (log, neg):
        node.meta["eager_input_vals"] = ((), {})

    def fails() -> None:
        assert doubled in neg.args or "eager_input_vals" not in log.meta
        raise RuntimeError("refused")

    changes = {"replaced": ((exp, doubled),), "redirected": ((neg, exp, doubled),), "free_strides": (log, neg)}
    with pytest.raises(RuntimeError, match="refused"):
        Rewrite(**{what: changes[what]}, committed=fails).commit([doubled])
    assert log.args == neg.args == (exp,) and set(exp.users) == {log, neg} and not doubled.users
    assert all("eager_input_vals" in node.meta for node in (log, neg))


def test_a_rewrite_that_holds_says_so() -> None:
    _, (exp, *_), doubled = rewrite_of(chain)
    readers: list[int] = []
    Rewrite(replaced=((exp, doubled),), committed=lambda: readers.append(len(doubled.users))).commit([doubled])
    assert readers == [2]


def test_shapes_as_arguments() -> None:
    graph, (exp,) = traced(torch.exp, X)
    assert shape_arg(Builder(graph), (2, 3, 4)) == [2, 3, 4] and shape_arg(Builder(graph), ()) == []
    graph, (exp,) = traced(torch.exp, X, mode="symbolic")
    rows, columns, depth = value(exp).shape
    new = Builder(graph)
    with new.before(exp):
        assert shape_arg(new, (rows, 12)) == [-1, 12] and new.made == []
        first, two, second = shape_arg(new, (rows, 2, depth))
    assert two == 2 and (first.target, first.args[1]) == (aten.sym_size.int, 0) and second.args[1] == 2
    assert first.args[0] is exp.args[0] and [node.meta["val"] for node in (first, second)] == [rows, depth]
    with pytest.raises(AssertionError, match=r"no input of the graph has the size"):
        shape_arg(new, (rows * 7, columns + 5))


def test_a_symbol_that_is_an_input_is_taken_from_there() -> None:
    graph, (exp,) = traced(torch.exp, X, mode="symbolic")
    rows, columns, _ = value(exp).shape
    with graph.inserting_before(next(iter(graph.nodes))):
        size, unknown = graph.placeholder("size"), graph.placeholder("unknown")
    size.meta["val"] = columns
    new = Builder(graph)
    with new.before(exp):
        first, second = shape_arg(new, (rows, columns))
    assert second is size and first.target is aten.sym_size.int and unknown.meta == {}


def test_rows_and_shapes_are_viewed_only_where_they_differ() -> None:
    graph, (exp, flat) = traced(lambda x: (x.exp(), x.sum((0, 1))), X)
    (x,) = graph.find_nodes(op="placeholder")
    new = Builder(graph)
    with new.before(exp):
        rows = as_rows(new, x, 4)
        assert value(rows).shape == (6, 4) and as_rows(new, rows, 4) is rows
        assert value(as_rows(new, rows, 2)).shape == (12, 2)
        column = new(aten.unsqueeze.default, flat, 0)
        assert as_row(new, flat, 4) is flat and value(as_row(new, column, 4)).shape == (4,)
        assert shaped(new, x, exp) is x and value(shaped(new, rows, exp)).shape == (2, 3, 4)


@pytest.mark.parametrize(
    ("form", "shape", "operations"),
    [
        (((ROWS,), (G,)), (3, 4), []),
        (((ROWS,), (G,), ()), (3, 4, 1), ["aten.reshape"]),
        (((G,), (ROWS,)), (4, 3), ["aten.permute"]),
        (((G,), (), (ROWS,)), (4, 1, 3), ["aten.permute", "aten.reshape"]),
    ],
)
def test_a_scale_is_rebuilt_in_the_form_that_it_had(form, shape, operations) -> None:
    scale = torch.arange(12.0).view(3, 4)
    like = scale.t().reshape(shape) if operations[:1] == ["aten.permute"] else scale.reshape(shape)
    graph, calls = traced(lambda scale, like: like.neg(), scale, like)
    given, old = graph.find_nodes(op="placeholder")
    new = Builder(graph)
    with new.before(calls[0]):
        made = rebuild(new, given, old, form)
    assert [str(node.target).removesuffix(".default") for node in new.made] == operations
    old.replace_all_uses_with(made)
    assert torch.equal(result(graph, scale, torch.zeros(shape)), -like)


@pytest.mark.parametrize("layout", ["row", "col"])
def test_a_scale_is_copied_into_another_layout(layout) -> None:
    scale = torch.arange(12.0).view(3, 4)
    scale = scale.t().contiguous().t() if layout == "row" else scale
    graph, (neg,) = traced(torch.neg, scale)
    new = Builder(graph)
    with new.before(neg):
        made = laid_out(new, neg.args[0], layout)
    neg.replace_all_uses_with(made)
    copied = result(graph, scale)
    assert torch.equal(copied, scale) and copied.stride() == ((4, 1) if layout == "row" else (1, 3))
    assert value(made).stride() == copied.stride()


def test_shapes_of_several_symbols_are_read_off_the_graph() -> None:
    """Of shapes that hold more than one symbol, none can be left to be inferred."""
    graph, (exp, total) = traced(lambda x: (x.exp(), x.sum(-1)), X, mode="symbolic")
    new = Builder(graph)
    (x,) = [node for node in graph.find_nodes(op="placeholder") if isinstance(node.meta["val"], torch.Tensor)]
    with new.before(exp):
        rows = new(aten.reshape.default, x, [-1])
        assert value(shaped(new, rows, exp)).shape == value(exp).shape
        scale = new(aten.sum.dim_IntList, x, [-1])
        form = ((ROWS,), (), (G,))
        old = new(aten.unsqueeze.default, total.args[0], 1)
        made = rebuild(new, scale, new(aten.sum.dim_IntList, old, [-1]), form)
    assert value(made).shape == (value(x).shape[0], 1, value(x).shape[1])
    assert [node.target for node in new.made].count(aten.sym_size.int) == 5


def test_an_op_takes_the_place_of_what_several_nodes_made() -> None:
    graph, (total, count) = traced(lambda x: (x.amax(-1), x.argmax(-1)), X)
    (x,) = graph.find_nodes(op="placeholder")
    new = Builder(graph)
    replaced = call_in_place_of(new, total, (total, count), aten.max.dim, x, 4, 1)
    assert [old for old, _ in replaced] == [total, count]
    assert value(new.made[0].args[0] if isinstance(new.made[0].args[0], Node) else x).dim() in (2, 3)
    Rewrite(replaced).commit(new.made)
    graph.eliminate_dead_code()
    given = result(graph, X)
    assert torch.equal(given[0], X.amax(-1)) and torch.equal(given[1], X.argmax(-1))
    graph, (total, _) = traced(lambda x: (x.amax(-1), x.argmax(-1)), X)
    (x,) = graph.find_nodes(op="placeholder")
    new = Builder(graph)
    ((old, made),) = call_in_place_of(new, total, (None, total), aten.max.dim, x, 4, 1)
    assert old is total and value(made).dtype == torch.int64, "the second output, where nobody reads the first"
