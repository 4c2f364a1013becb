"""Axes of a quantization followed through shapes."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch
from torch.fx import Graph, Node

from normquant.compile.find.axes import (
    ROWS,
    Axes,
    Axis,
    Form,
    distribute,
    flatten,
    order,
    scales_groups,
    through,
    without,
)
from normquant.compile.find.graph import aten, prims

AXES = Axes(512, 128, False, (128, 512))
G, L = Axis("g", 4), Axis("l", 128)
UPPER, LOWER = Axis("m", None, (0, 2)), Axis("m", None, (1, 2))  # rows in two dimensions
ROW_COUNTS = {ROWS: 6, UPPER: 2, LOWER: 3}


@pytest.mark.parametrize(
    ("shape", "form"),
    [
        ((7, 512), ((ROWS,), (G, L))),
        ((7, 4, 128), ((ROWS,), (G,), (L,))),
        ((28, 128), ((ROWS, G), (L,))),
        ((3584,), ((ROWS, G, L),)),
        ((1, 7, 512), ((), (ROWS,), (G, L))),
        ((7, 1, 4, 1, 128), ((ROWS,), (), (G,), (), (L,))),
        ((2, 3, 512), ((UPPER,), (LOWER,), (G, L))),
        ((2, 1, 3, 512), ((UPPER,), (), (LOWER,), (G, L))),
    ],
)
def test_the_form_of_a_shape(shape: tuple[int, ...], form: tuple) -> None:
    assert AXES.of_shape(shape) == form
    assert flatten(form) == AXES.data()


@pytest.mark.parametrize("shape", [(7, 256, 2), (7, 8, 64), (14, 256), (2, 3, 8, 64)])
def test_a_shape_that_cuts_a_group_has_no_form(shape: tuple[int, ...]) -> None:
    assert AXES.of_shape(shape) is None


def test_axes_cut_where_a_shape_cuts_them() -> None:
    axes = Axes(512, 32, False, (32, 128, 512))
    assert [(a.name, a.size) for a in axes.data()] == [("m", None), ("g", 4), ("g", 4), ("l", 32)]
    assert axes.of_shape((7, 4, 128)) is not None and axes.of_shape((7, 16, 32)) is not None
    assert order(axes.of_shape((7, 512)) or ()) == ["m", "g", "l"]


def test_the_pieces_of_an_axis_are_whole_numbers_outermost_first() -> None:
    pieces = Axes(1024, 32, False, (8, 32, 128, 1024)).data()[1:]
    assert [(axis.name, axis.size, axis.part) for axis in pieces] == [
        ("g", 8, (0, 2)),
        ("g", 4, (1, 2)),
        ("l", 4, (0, 2)),
        ("l", 8, (1, 2)),
    ]
    assert {type(axis.size) for axis in pieces} == {int}


def test_one_row_and_one_group_have_no_axis() -> None:
    axes = Axes(128, 128, True, (128,))
    assert axes.data() == (L,) and axes.scale() == ()
    assert axes.of_shape((1, 128)) == ((), (L,))


def test_transposed_axes_are_followed() -> None:
    transposed = ((G,), (ROWS,))
    assert order(transposed) == ["g", "m"]
    assert distribute(flatten(transposed), (4, 7)) == transposed
    assert distribute(flatten(transposed), (28,)) == ((G, ROWS),)


def test_pieces_in_another_order_have_none() -> None:
    assert order(((UPPER,), (LOWER,), (G,))) == ["m", "g"]
    assert order(((LOWER,), (UPPER,), (G,))) is None
    assert order(((UPPER,), (G,), (LOWER,))) is None
    assert order(((ROWS,), (Axis("g", 2, (1, 2)),), (Axis("g", 4, (0, 2)),))) is None


def test_which_scale_meets_which_value() -> None:
    data = ((ROWS,), (G,), (L,))
    assert scales_groups(((ROWS,), (G,), ()), data)
    assert scales_groups(((ROWS,), (G,), (Axis("*", 128),)), data)
    assert scales_groups(((ROWS,), (G, Axis("*", 128))), ((ROWS,), (G, L)))
    assert not scales_groups(((ROWS,), (Axis("*", 4),), ()), data)
    assert not scales_groups(((G,), (ROWS,), ()), data)
    assert not scales_groups(((ROWS,), (G,)), data)
    assert not scales_groups(((ROWS,), (G, Axis("*", 64))), ((ROWS,), (G, L)))
    assert not scales_groups(((), *data), data)
    assert scales_groups(((G,), ()), ((G,), (L,))) and scales_groups(((G,), ()), ((), (G,), (L,)))
    assert not scales_groups(((G,), ()), data)  # one scale for all rows


def tensor_of(form: Form) -> torch.Tensor:
    """A tensor that has the form, each value the place of its element in the activation [6, 512]."""
    unit = {"m": 512, "g": 128, "l": 1, "*": 0}
    axes = [axis for dim in form for axis in dim]
    sizes = {axis: ROW_COUNTS[axis] if axis.size is None else axis.size for axis in axes}
    whole = torch.zeros((), dtype=torch.int64)
    for dim in form:
        places = torch.zeros(1, dtype=torch.int64)
        for axis in dim:
            inner = prod(sizes[other] for other in axes if other.name == axis.name and other.part > axis.part)
            places = (places[:, None] + torch.arange(sizes[axis]) * unit[axis.name] * inner).flatten()
        whole = whole[..., None] + places
    return whole


def calling(op: Any, x: torch.Tensor, *args: Any) -> Node:
    graph = Graph()
    given = graph.placeholder("x")
    given.meta["val"] = x
    node = graph.call_function(op, (given, *args))
    node.meta["val"] = op(x, *args)
    return node


GROUPED: Form = ((ROWS,), (G,), (L,))
SCALES: Form = ((ROWS,), (G,))
ONE: Form = ((ROWS,), (G,), ())
FOLLOWED = [
    (SCALES, aten.t.default),
    (GROUPED, aten.permute.default, [2, 0, 1]),
    (GROUPED, aten.permute.default, [1, 2, 0]),
    (GROUPED, aten.permute.default, [-1, 0, -2]),
    (GROUPED, aten.transpose.int, 0, 1),
    (GROUPED, aten.transpose.int, -1, 0),
    (((UPPER,), (LOWER,), (G,)), aten.transpose.int, 1, 2),
    (ONE, aten.expand.default, [6, 4, 128]),
    (ONE, aten.expand.default, [6, 4, 2]),
    (ONE, aten.expand.default, [6, 4, 1]),
    (ONE, aten.expand.default, [-1, -1, -1]),
    (SCALES, aten.expand.default, [3, 6, 4]),
    (SCALES, aten.expand.default, [1, 6, 4]),
    (GROUPED, aten.clone.default),
    (GROUPED, aten.alias.default),
    (GROUPED, prims.convert_element_type.default, torch.int32),
    (GROUPED, aten.reshape.default, [6, 512]),
    (GROUPED, aten.view.default, [24, 128]),
    (GROUPED, aten.reshape.default, [3072]),
    (((G,), (ROWS,)), aten.reshape.default, [24]),
    (((G,), (ROWS,)), aten.reshape.default, [4, 1, 6]),
    (((ROWS,), (G, L)), aten.reshape.default, [6, 4, 128]),
    (((ROWS,), (G, L)), aten.reshape.default, [2, 3, 512]),
    (((UPPER,), (LOWER,), (G, L)), aten.reshape.default, [6, 4, 128]),
    (((G,), (UPPER,), (LOWER,)), aten.reshape.default, [4, 6]),
    (ONE, aten.squeeze.dim, 2),
    (ONE, aten.squeeze.default),
    (SCALES, aten.unsqueeze.default, 1),
    (SCALES, aten.unsqueeze.default, -1),
]


@pytest.mark.parametrize("case", FOLLOWED, ids=str)
def test_the_form_after_an_operation_is_that_of_its_values(case: tuple) -> None:
    form, op, *args = case
    node = calling(op, tensor_of(form), *args)
    after = through(node, form)
    assert after is not None and torch.equal(tensor_of(after), node.meta["val"].long())


LOST = [
    (GROUPED, aten.flip.default, [0]),
    (GROUPED, aten.slice.Tensor, 0, 1, 3),
    (GROUPED, aten.neg.default),
    (((LOWER,), (UPPER,), (G,)), aten.reshape.default, [6, 4]),
    (((UPPER,), (G,), (LOWER,)), aten.reshape.default, [8, 3]),
    (((ROWS,), (G, L)), aten.reshape.default, [6, 8, 64]),
    (((G,), (ROWS,)), aten.reshape.default, [2, 12]),
    (((G,), (ROWS,)), aten.reshape.default, [8, 3]),
]


@pytest.mark.parametrize("case", LOST, ids=str)
def test_an_operation_that_cannot_be_followed_leaves_no_form(case: tuple) -> None:
    form, op, *args = case
    assert through(calling(op, tensor_of(form), *args), form) is None


def test_a_size_that_is_not_known_is_no_row_that_is_repeated() -> None:
    rows = torch.export.Dim("rows", min=2)
    exported = torch.export.export(Expanding(), (torch.zeros(1, 4), torch.zeros(6)), dynamic_shapes=(None, {0: rows}))
    (node,) = [n for n in exported.graph.nodes if n.target is aten.expand.default]
    assert through(node, ((), (G,))) is None and through(node, ((ROWS,), (G,))) == ((ROWS,), (G,))
    unknown, four = node.meta["val"].shape
    assert distribute((ROWS, G), (unknown, four)) == ((ROWS,), (G,))
    assert distribute((G, ROWS), (four, unknown)) == ((G,), (ROWS,))


class Expanding(torch.nn.Module):
    def forward(self, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return x.expand(like.shape[0], 4)


def test_axes_that_are_taken_out() -> None:
    assert without(GROUPED, "l") == ONE and without(((ROWS,), (G, L)), "l") == SCALES
    assert without(GROUPED, "*") == GROUPED
