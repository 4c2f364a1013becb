"""Which algorithm a call gets: the committed table, its rule for other numbers of ranks, and the room there is."""

from __future__ import annotations

import pytest
from shared.rank_records import MEASURED_ONE_SHOT, WIDTHS, K, measured

from normquant.distributed.algorithms import COLLECTIVE, ONE_SHOT, PIECES, TWO_SHOT, choose, one_shot_rows
from normquant.distributed.pieces import piece_rows
from normquant.kernels.exchange_layout import two_shot_bytes

ROOM = 1 << 40


def line(points: list[tuple[int, float]]) -> tuple[float, float]:
    """us at no rows, and us for each row, through two points."""
    (m, us), (more, more_us) = points
    slope = (more_us - us) / (more - m)
    return us - slope * m, slope


def crossing(ranks: int, sharded: bool, k: int = K) -> float:
    """Where the line through the two largest sizes with one shot meets that through the two smallest with two."""
    us = {call.m: us for call, us in measured((ranks,), [k]).items() if call.sharded == sharded}
    one = line([(m, us[m]) for m in us if m <= MEASURED_ONE_SHOT[ranks]][-2:])
    two = line([(m, us[m]) for m in us if m > MEASURED_ONE_SHOT[ranks]][:2])
    return (two[0] - one[0]) / (one[1] - two[1])


@pytest.mark.parametrize(("ranks", "sharded"), [(2, True), (4, False), (4, True), (8, False), (8, True)])
def test_one_shot_ends_where_the_measurements_cross(ranks: int, sharded: bool) -> None:
    assert one_shot_rows(ranks, sharded) == pytest.approx(crossing(ranks, sharded), rel=0.15)


def test_on_2_ranks_with_the_whole_residual_one_shot_ends_between_what_was_measured() -> None:
    assert crossing(2, False) < 0  # they do not cross
    assert MEASURED_ONE_SHOT[2] < one_shot_rows(2, False) < 256


def test_the_measurements_do_not_show_that_one_shot_ends_at_other_rows_in_other_widths() -> None:
    """At 7168 / K times the rows only where 4 ranks shard the residual; the figures are those of docs/scale.md."""
    sharded, whole = ([crossing(4, own, k) for k in WIDTHS] for own in (True, False))
    assert [round(rows) for rows in sharded] == [43, 28, 24, 18, 15]
    assert [round(rows) for rows in whole] == [71, 51, 47, 48, 40]
    assert all(crossing(2, False, k) < 0 for k in WIDTHS)
    assert [round(crossing(2, True, k)) for k in WIDTHS] == [87, 330, 46, 65, 164]


def test_other_numbers_of_ranks_have_the_rows_of_the_next_higher_one() -> None:
    for sharded in (False, True):
        rows = {n: one_shot_rows(n, sharded) for n in range(2, 17)}
        assert rows[3] == rows[4] and {rows[n] for n in (5, 6, 7, 9, 16)} == {rows[8]}


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("world", [2, 4, 8])
def test_a_call_gets_what_the_table_and_the_room_allow(world: int, sharded: bool) -> None:
    last = one_shot_rows(world, sharded)
    chosen = [choose(m, K, world, ROOM, sharded).algorithm for m in (1, last, last + 1, 1 << 14)]
    assert chosen == [ONE_SHOT, ONE_SHOT, TWO_SHOT, TWO_SHOT]
    assert choose(2048, K, world, 1 << 22, sharded).algorithm == (COLLECTIVE if sharded else PIECES)
    assert choose(2048, K, world, 1 << 16, sharded).algorithm == COLLECTIVE  # with no room for four rows of each rank
    assert choose(1, K, world, 0, sharded).algorithm == COLLECTIVE


@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_pieces_fit_into_the_room_and_start_where_a_scale_can(world: int) -> None:
    half = two_shot_bytes(2048, K, world)
    for m in (2049, 4096, 5000, 8192, 16384):
        rows = piece_rows(m, K, world, half)
        assert rows % 4 == 0 and two_shot_bytes(rows, K, world) <= half
        assert rows * (-(-m // rows) - 1) < m <= rows * -(-m // (2048 // (4 * world) * (4 * world)))
    assert piece_rows(8192, K, world, 0) == 0
