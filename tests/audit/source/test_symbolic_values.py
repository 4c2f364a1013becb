"""Copies that a kernel only makes, told from work."""

from __future__ import annotations

import pytest
from shared.generated_code import COPY, module, program

STORE = "tl.store(out_ptr0 + (xindex), tmp0, xmask)"
MOVES = {
    "the same place": (COPY, "same"),
    "the same place, written otherwise": (
        "tmp0 = tl.load(in_ptr0 + (xindex), xmask)\ntl.store(out_ptr0 + (x0 + 64*x1), tmp0, xmask)",
        "same",
    ),
    "a transpose": (f"tmp0 = tl.load(in_ptr0 + (x1 + 64*x0), xmask)\n{STORE}", "layout"),
    "a broadcast": (f"tmp0 = tl.load(in_ptr0 + (x0), xmask)\n{STORE}", None),
    "a flip": (f"tmp0 = tl.load(in_ptr0 + (63 + (-1)*x0 + 64*x1), xmask)\n{STORE}", None),
    "overlapping windows": (f"tmp0 = tl.load(in_ptr0 + (x0 + x1), xmask)\n{STORE}", None),
    "a roll": (f"tmp0 = tl.load(in_ptr0 + (((x0 + 3) % 64) + 64*x1), xmask)\n{STORE}", None),
    "arithmetic": (f"tmp1 = tl.load(in_ptr0 + (xindex), xmask)\ntmp0 = tmp1 * 2\n{STORE}", None),
    "a part": (f"tmp0 = tl.load(in_ptr0 + (xindex), (x0 < 32) & xmask, other=0.0)\n{STORE}", None),
    "an addition in memory": (COPY.replace("tl.store", "tl.atomic_add"), None),
}


@pytest.mark.parametrize("name", MOVES)
def test_copies_are_told_from_work(name: str) -> None:
    body, kind = MOVES[name]
    (kernel,) = program(module(body)).kernels
    assert [copy.kind for copy in kernel.copies] == ([kind] if kind else [])
