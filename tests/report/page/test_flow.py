"""Which rows a ribbon connects, and in which copies of a layer its parts belong."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
from shared.generated_code import OFF, ON, SEEDS
from shared.many_layers import repeated

from normquant.audit import audit_path
from normquant.report.page import alignment, flow, folding
from normquant.report.page.flow import Part
from normquant.report.page.folding import Block
from normquant.report.page.timeline import Timeline, timeline


def drawn(report: dict[str, Any]) -> tuple[Timeline, list[Block], dict[int, flow.Place], list[flow.Ribbon]]:
    side = timeline(report)
    rows = alignment.rows([side])
    blocks = folding.blocks(rows, [side])
    where = flow.places(rows, blocks, 0)
    return side, blocks, where, flow.ribbons(side, where, blocks)


def chain(count: int, more: dict[tuple[int, int], int] | None = None) -> dict[str, Any]:
    """A first launch, `count` layers of four launches each, a last one; `more` edges by (from, to)."""
    names = ["first", *("abcd"[n % 4] for n in range(4 * count)), "last"]
    launches = [
        {"position": n, "name": name, "kind": "pointwise", "file": "", "line": 0, "code": "", "bytes_read": 64,
         "bytes_written": 64, "reads": {}, "writes": {f"buf{n}": 64}, "est_us": 1.0, "aten": [], "origins": []}
        for n, name in enumerate(names)
    ]  # fmt: skip
    edges = {(n, n + 1): 64 for n in range(len(names) - 1)} | (more or {})
    program = {
        "number": 0, "name": "p", "bytes": 0, "launches": launches, "buffers": {}, "outputs": [],
        "edges": [{"buffer": f"buf{a}", "from": a, "to": b, "bytes": count} for (a, b), count in edges.items()],
    }  # fmt: skip
    return {"programs": [program], "findings": []}


@pytest.mark.parametrize("path", [ON, OFF, *sorted(SEEDS.glob("*.py"))], ids=lambda path: path.stem)
def test_every_edge_is_part_of_a_ribbon(path: Any) -> None:
    side, _, where, ribbons = drawn(audit_path(path)[0].to_dict())
    edges = {(where[e.source].row, where[e.target].row) for e in side.passed if e.source is not None}
    assert edges == {(r.source.row, row) for r in ribbons for row in [*r.here, *(p.row for p in r.beyond)]}
    outside = {(where[e.target].row, e.buffer): e.bytes for e in side.passed if e.source is None}
    assert outside == {(row, b): n for row, held in flow.inputs(side, where).items() for b, n in held.items()}


def test_what_a_layer_hands_to_the_next_belongs_to_all_but_the_last() -> None:
    _, blocks, _, ribbons = drawn(chain(5))
    assert blocks == [Block(0, 1), Block(1, 4, 5), Block(21, 1)]
    into, last = ribbons[0], ribbons[4]  # of `first`, and of each layer's d
    assert list(flow.parts(into, blocks)) == [
        (0, Part(0, None, ())),
        (1, Part(None, 1, ((1, 64),), flow.FIRST)),
    ]
    assert list(flow.parts(last, blocks)) == [
        (1, Part(4, None, (), flow.NOT_LAST)),
        (1, Part(None, 1, ((1, 64),), flow.LATER)),
        (1, Part(4, None, (), flow.LAST)),
        (2, Part(None, 5, ((5, 64),))),
    ]


def test_what_every_layer_reads_goes_down_to_the_last() -> None:
    reads = {(0, 3 + 4 * n): 64 for n in range(5)}  # c of each layer reads what `first` wrote
    _, blocks, _, ribbons = drawn(chain(5, reads))
    assert list(flow.parts(ribbons[0], blocks))[1:] == [
        (1, Part(None, 3, ((1, 64), (3, 64)))),
        (1, Part(3, None, (), flow.NOT_LAST)),
    ]


def test_a_ribbon_passes_a_block_that_does_not_read_it() -> None:
    _, blocks, _, ribbons = drawn(chain(5, {(0, 21): 64}))
    assert (1, Part(None, None, ((1, 64),))) in list(flow.parts(ribbons[0], blocks))
    assert list(flow.parts(ribbons[0], blocks))[-1] == (2, Part(None, 5, ((5, 64),)))


@pytest.mark.parametrize("count", [1, 5])
def test_ribbons_that_pass_the_same_row_do_not_overlap(count: int) -> None:
    report = repeated(audit_path(ON, rows=(64,))[0].to_dict(), count)
    _, blocks, _, ribbons = drawn(report)
    width = {n: 2.0 + n % 3 for n in range(len(ribbons))}
    widest = flow.spread(ribbons, width, blocks, 4, 1000)
    spans = [
        flow._span(ribbon, [sum(b.length for b in blocks[:n]) for n in range(len(blocks) + 1)]) for ribbon in ribbons
    ]
    for a, b in combinations(width, 2):
        if spans[a][0] < spans[b][1] and spans[b][0] < spans[a][1]:
            left, right = sorted((a, b), key=lambda n: ribbons[n].track)
            assert ribbons[left].track + width[left] + 4 <= ribbons[right].track
    assert widest == max(ribbons[n].track + width[n] for n in width)


def test_too_many_ribbons_share_the_last_place() -> None:
    _, blocks, _, ribbons = drawn(chain(1, {(0, n): 64 for n in range(2, 6)} | {(1, 5): 64, (2, 5): 64}))
    assert flow.spread(ribbons, dict.fromkeys(range(3), 20.0), blocks, 4, 30) <= 30
