"""The committed measurements of the ops of several ranks, and which algorithm each was measured with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from normquant.bench.record_files import read
from normquant.distributed.algorithms import ONE_SHOT, TWO_SHOT
from normquant.distributed.cost import GroupCall

K = 7168  # the width that the table of algorithms and the cost model are made from
MEASURED_ONE_SHOT = {2: 64, 4: 32, 8: 16}  # the rows up to which the records were measured with one shot
ROOM = 2048  # rows of the workspace that they were measured with
ALL = [r for r in read(Path(__file__).parents[2] / "baselines" / "h200.jsonl") if "ranks" in r]
BY_ALGORITHM = {  # provider -> the algorithm that it has whatever the table chooses, and whether it is sharded
    "normquant one-shot": (ONE_SHOT, False),
    "normquant two-shot": (TWO_SHOT, False),
    "normquant two-shot sharded": (TWO_SHOT, True),
}
RECORDS = [r for r in ALL if r["m"] <= ROOM and r["provider"] not in BY_ALGORITHM]
WIDTHS = sorted({r["k"] for r in RECORDS})


def measured(ranks: tuple[int, ...], widths: Sequence[int] = (K,)) -> dict[GroupCall, float]:
    """Microseconds of this package's op."""
    found = {}
    for r in RECORDS:
        if r["ranks"] in ranks and r["k"] in widths and r["provider"] in ("normquant", "normquant sharded"):
            algorithm = ONE_SHOT if r["m"] <= MEASURED_ONE_SHOT[r["ranks"]] else TWO_SHOT
            found[GroupCall(r["ranks"], r["m"], algorithm, "sharded" in r["provider"], r["k"])] = r["us"]
    return found


def side_by_side(ranks: int, k: int, sharded: bool) -> dict[int, tuple[float, float]]:
    """Rows -> microseconds with one shot, which sends no sum whether it is sharded or not, and with two shots."""
    us: dict[str, dict[int, float]] = {name: {} for name in BY_ALGORITHM}
    for r in ALL:
        if (r["ranks"], r["k"]) == (ranks, k) and r["provider"] in us:
            us[r["provider"]][r["m"]] = r["us"]
    two = us["normquant two-shot sharded" if sharded else "normquant two-shot"]
    return {m: (one, two[m]) for m, one in sorted(us["normquant one-shot"].items())}
