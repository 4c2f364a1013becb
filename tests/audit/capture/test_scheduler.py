"""Bytes from the text of the kernels, beside those that Inductor's scheduler counts."""

from __future__ import annotations

import pytest
from shared.clean_graphs import GRAPHS, compiled

# Where the scheduler's own count is the coarser one; that the code's is right is counted by hand in test_evaluate.py.
COUNTED_COARSELY = {
    "attention_block": "the slices of q and k are two views of one buffer, counted as three",
    "group_norm": "the reduction's own result counts as read",
    "in_place_add": "the reduction's own result counts as read",
    "kv_cache_update": "the whole cache counts as read and written, of which a few rows are written",
}


def counts(name: str) -> tuple[list[tuple[str, int, int]], list[tuple[str, int, int]]]:
    """(launch, bytes read, bytes written): from the text of the kernels, and as Inductor's scheduler counts."""
    captured, report = compiled(name)
    from_code = [(launch.name, launch.bytes_read, launch.bytes_written) for launch in report.launches]
    return from_code, [(n.name, n.bytes_read, n.bytes_written) for n in captured.scheduled.launches]


@pytest.mark.parametrize("name", sorted({*GRAPHS} - {*COUNTED_COARSELY}))
def test_bytes_agree_with_the_scheduler(name: str) -> None:
    from_code, scheduled = counts(name)
    assert from_code == scheduled


@pytest.mark.parametrize("name", COUNTED_COARSELY)
def test_the_code_shows_less_than_the_scheduler_counts(name: str) -> None:
    from_code, scheduled = counts(name)
    assert [launch for launch, _, _ in from_code] == [launch for launch, _, _ in scheduled]
    assert sum(read + written for _, read, written in from_code) < sum(r + w for _, r, w in scheduled)
