"""Sizes in generated code, as numbers."""

from __future__ import annotations

import ast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from normquant.audit import size_expressions


@given(st.integers(1, 10_000), st.integers(1, 64))
def test_expressions_are_evaluated(rows: int, by: int) -> None:
    for text, expected in (
        ("s0*7168", rows * 7168), ("(-4)*(s0 // (-4))", -4 * (rows // -4)), ("s0**2", rows**2),
        (f"s0 // {by} + s0 % {by}", rows // by + rows % by), ("max(1, s0)", max(1, rows)),
        ("(s0 + 3)//4*4", (rows + 3) // 4 * 4),
    ):  # fmt: skip
        assert size_expressions.evaluate(ast.parse(text, mode="eval").body, {"s0": rows}) == expected


@pytest.mark.parametrize(
    "text", ["s1", "1/0", "9**9**9", "10**9*10**9*10**9", "f(1)", "'a'", "True", "1 << 999", "[1]"]
)
def test_what_is_no_size_has_no_value(text: str) -> None:
    with pytest.raises(size_expressions.UnknownSize):
        size_expressions.evaluate(ast.parse(text, mode="eval").body, {})
