"""How many elements an index reaches."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from normquant.audit.source.index_reach import Bound, Digit, distinct


@given(st.data())
def test_distinct_counts_what_a_loop_would(data: st.DataObject) -> None:
    """Against counting: every value of the loop, the digits that it has there, and how many combinations differ."""
    radices = data.draw(st.lists(st.integers(2, 5), min_size=1, max_size=4))
    edges = [1]
    for radix in radices:
        edges.append(edges[-1] * radix)
    low = st.integers(0, len(edges) - 2)
    pairs = data.draw(
        st.lists(low.flatmap(lambda a: st.tuples(st.just(a), st.integers(a + 1, len(edges) - 1))), max_size=3)
    )
    digits = [Digit("x", edges[a], edges[b]) for a, b in pairs]
    seen = {tuple(n // d.low % (d.high // d.low) for d in digits) for n in range(edges[-1])}
    assert distinct(digits) == len(seen)


def test_bounds_limit_what_counts() -> None:
    x = Digit("x", 1, 64)
    assert distinct([x, Digit("x", 64, 4096)], [Bound(x, 0, 32)]) == 32 * 64
    assert distinct([Digit("x", 64, 4096)], [Bound(x, 0, 32)]) == 64, "a bound on what is not in the index"
    assert distinct([x], [Bound(x, 16, 80)]) == 48
