"""Axes of a quantization followed through shapes."""

from __future__ import annotations

import pytest

from normquant.compile.find.axes import ROWS, Axes, Axis, distribute, flatten, order, scales_groups

AXES = Axes(512, 128, False, (128, 512))
G, L = Axis("g", 4), Axis("l", 128)


@pytest.mark.parametrize(
    ("shape", "form"),
    [
        ((7, 512), ((ROWS,), (G, L))),
        ((7, 4, 128), ((ROWS,), (G,), (L,))),
        ((28, 128), ((ROWS, G), (L,))),
        ((3584,), ((ROWS, G, L),)),
        ((1, 7, 512), ((), (ROWS,), (G, L))),
        ((7, 1, 4, 1, 128), ((ROWS,), (), (G,), (), (L,))),
        ((2, 3, 512), ((Axis("m", None, (0, 2)),), (Axis("m", None, (1, 2)),), (G, L))),
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
    first, second = Axis("m", None, (0, 2)), Axis("m", None, (1, 2))
    assert order(((first,), (second,), (G,))) == ["m", "g"]
    assert order(((second,), (first,), (G,))) is None
    assert order(((first,), (G,), (second,))) is None
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
