"""The cost model against the committed measurements: fitted on 2 and 4 ranks, it has to predict 8."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import pytest
from shared.rank_records import WIDTHS, K, measured

from normquant.distributed.algorithms import ONE_SHOT, TWO_SHOT
from normquant.distributed.cost import H200, GroupCall, fit

OTHERS = [k for k in WIDTHS if k != K]


def errors(ranks: tuple[int, ...], widths: Sequence[int] = (K,)) -> list[float]:
    return [H200.us(call) / us - 1 for call, us in measured(ranks, widths).items()]


def test_the_constants_are_the_fit_of_2_and_4_ranks() -> None:
    calls = measured((2, 4))
    found = fit(list(calls), list(calls.values()))
    for name in ("launch_us", "peer_us", "hop_us", "gb_per_s"):
        assert getattr(H200, name) == pytest.approx(getattr(found, name), rel=0.01), name


def test_the_fit_is_within_7_percent_and_the_prediction_for_8_ranks_within_29() -> None:
    assert len(errors((2, 4))) == 28 and max(map(abs, errors((2, 4)))) < 0.075
    assert len(errors((8,))) == 12 and -0.29 < min(errors((8,))) < -0.27 and max(errors((8,))) < 0.05


def test_the_prediction_for_other_widths_is_within_18_percent_and_mostly_far_closer() -> None:
    found = [abs(error) for error in errors((2, 4), OTHERS)]
    assert len(found) == 80 and 0.17 < max(found) < 0.18 and median(found) < 0.035
    assert max(abs(error) for error in errors((2, 4), [k for k in OTHERS if k != 2048])) < 0.14


@pytest.mark.parametrize(
    ("algorithm", "sharded", "kilobytes"), [(ONE_SHOT, False, 43.0), (TWO_SHOT, False, 27.0), (TWO_SHOT, True, 16.3)]
)
def test_bytes_of_a_row_on_4_ranks(algorithm: str, sharded: bool, kilobytes: float) -> None:
    assert GroupCall(4, 1, algorithm, sharded).row_bytes / 1e3 == pytest.approx(kilobytes, abs=0.05)
