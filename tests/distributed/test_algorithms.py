"""Which algorithm a call gets: the committed table, its rule for other numbers of ranks, and the room there is."""

from __future__ import annotations

from itertools import product

import pytest
from shared.rank_records import MEASURED_ONE_SHOT, WIDTHS, K, measured, side_by_side

from normquant.distributed.algorithms import COLLECTIVE, ONE_SHOT, PIECES, TWO_SHOT, choose, one_shot_rows
from normquant.distributed.pieces import piece_rows
from normquant.kernels.exchange_layout import two_shot_bytes

ROOM = 1 << 40


CHOICES = list(product((2, 4), WIDTHS, (False, True)))  # ranks, width, sharded or not, where both were measured


@pytest.mark.parametrize(("ranks", "k", "sharded"), CHOICES)
def test_the_algorithm_that_is_chosen_loses_little_at_every_size_that_was_measured_with_both(
    ranks: int, k: int, sharded: bool
) -> None:
    last = one_shot_rows(ranks, k, sharded)
    both = side_by_side(ranks, k, sharded)
    lost = {rows: sum(max(0.0, loss(us, m <= rows)) for m, us in both.items()) for rows in (0, *both)}
    known = max(m for m in both if m <= last)
    assert lost[known] == min(lost.values())
    assert all(loss(us, m <= last) < 0.05 for m, us in both.items())


def loss(us: tuple[float, float], one_shot: bool) -> float:
    """By how much of the other's time an algorithm is slower."""
    chosen, other = us if one_shot else us[::-1]
    return chosen / other - 1


@pytest.mark.parametrize(("ranks", "k", "sharded"), CHOICES)
def test_one_shot_ends_where_straight_lines_between_the_sizes_cross(ranks: int, k: int, sharded: bool) -> None:
    last = one_shot_rows(ranks, k, sharded)
    both = side_by_side(ranks, k, sharded)
    before, after = max(m for m in both if m <= last), min((m for m in both if m > last), default=None)
    if after is None:
        assert last == before  # the largest that was measured
        return
    gain, more = (both[m][1] - both[m][0] for m in (before, after))
    assert last == round(before + (after - before) * gain / (gain - more))


def line(points: list[tuple[int, float]]) -> tuple[float, float]:
    """us at no rows, and us for each row, through two points."""
    (m, us), (more, more_us) = points
    slope = (more_us - us) / (more - m)
    return us - slope * m, slope


@pytest.mark.parametrize("sharded", [False, True])
def test_on_8_ranks_one_shot_ends_where_the_measurements_of_each_algorithm_cross(sharded: bool) -> None:
    us = {call.m: us for call, us in measured((8,)).items() if call.sharded == sharded}
    one = line([(m, us[m]) for m in us if m <= MEASURED_ONE_SHOT[8]][-2:])
    two = line([(m, us[m]) for m in us if m > MEASURED_ONE_SHOT[8]][:2])
    assert one_shot_rows(8, K, sharded) == pytest.approx((two[0] - one[0]) / (one[1] - two[1]), rel=0.15)


def test_other_widths_have_as_many_values_as_the_nearest() -> None:
    assert one_shot_rows(4, 1536, True) == one_shot_rows(4, 2048, True) * 2048 // 1536
    assert one_shot_rows(2, 16384, False) == one_shot_rows(2, 8192, False) // 2
    assert one_shot_rows(8, 3584, False) == 2 * one_shot_rows(8, 7168, False)


def test_other_numbers_of_ranks_have_the_rows_of_the_next_higher_one() -> None:
    for sharded in (False, True):
        rows = {n: one_shot_rows(n, K, sharded) for n in range(2, 17)}
        assert rows[3] == rows[4] and {rows[n] for n in (5, 6, 7, 9, 16)} == {rows[8]}


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("world", [2, 4, 8])
def test_a_call_gets_what_the_table_and_the_room_allow(world: int, sharded: bool) -> None:
    last = one_shot_rows(world, K, sharded)
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
