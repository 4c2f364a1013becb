"""Which launch config a kernel gets.

Configs change speed and never a bit of the result. They come from a committed table for each compute capability,
measured by the tuner; what the table lacks follows the rule in `_rule`.
"""

from __future__ import annotations

import json
import sys
from bisect import bisect_left
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from importlib import resources
from typing import Any

from normquant.kernels.capability import MAX_CLUSTER, has_clusters
from normquant.kernels.tiling import power_of_two, power_of_two_in

# When the next kernel may be scheduled: before this one waits for the one before it, right after, or when it has loaded
# its inputs.
RELEASES = ("start", "waited", "loaded")
OF_PARTS = " of parts"  # behind the name of an op in a table: its configs for rows that are partial sums
KEPT_SUM = 4 << 20  # bytes of x + residual that the L2 is asked to keep at the most, of 50 MB on an H100

ConfigRow = dict[str, Any]  # {"up_to": largest M, field of a Config: value, ...}, without defaults
ConfigTable = dict[
    str, dict[str, list[ConfigRow]]
]  # by op and K; rows ascend in M, and the last holds for every larger M


@dataclass(frozen=True)
class Config:
    """How a kernel is launched. Fields change its speed and no bit of its result.

    num_warps: warps of a program.
    split: over how many programs a row is split.
    rows: how many rows a program takes, a power of two, one where a row is split.
    prefetch: whether a norm asks the L2 for its row while the kernel before it is still running, which pays where few
        rows leave the GPU idle.
    late_weight: whether a norm reads its weight only when the sum of squares is there, which leaves registers for more
        programs where many rows fill the GPU.
    evict_first: whether a norm says that nobody reads x and the residual again, so that the L2 keeps what is written.
    release: when the next kernel may be scheduled, one of RELEASES. The earlier, the more time a GEMM has to set itself
        up, and the longer it takes a place from others.
    tiles: in how many tiles at the most a norm holds a row, each a power of two of groups: 40 groups are one tile of
        64, or two of 32 and 8 without idle lanes.
    keep_sum: whether the L2 keeps x + residual as long as it can, for the next norm, two GEMMs later.
    cluster: whether the programs of a split row exchange their sums of squares, where the GPU can, so that each reads
        its own part of the row only.
    """

    num_warps: int
    split: int = 1
    rows: int = 1
    prefetch: bool = False
    late_weight: bool = False
    evict_first: bool = False
    release: str = "loaded"
    tiles: int = 1
    keep_sum: bool = False
    cluster: bool = False

    def __post_init__(self) -> None:
        if self.release not in RELEASES:
            raise ValueError(f"{self}: release is one of {', '.join(RELEASES)}")
        if self.rows > 1 and (self.split > 1 or self.prefetch):
            raise ValueError(f"{self}: several rows for a program go with neither a split nor a prefetch")
        if self.cluster and not 1 < self.split <= MAX_CLUSTER:
            raise ValueError(f"{self}: a cluster takes 2 to {MAX_CLUSTER} programs")
        if self.evict_first and self.split > 1 and not self.cluster:
            raise ValueError(f"{self}: the programs of a split row read it more than once")
        if self.tiles > 1 and self.split > 1:
            raise ValueError(f"{self}: the programs of a split row hold it in one tile")


def config(op: str, k: int, m: int, capability: tuple[int, int] | None, of_parts: bool = False) -> Config:
    """The config of `op` for [m, k] on a compute capability: the table's if it has (op, k), else the rule's.

    of_parts: for rows that are the partial sums of a product. Where the table has none for those it is that of plain
    rows, but the next kernel comes late: most likely it is another product, whose programs take much shared memory, and
    those that came before the reader's own were seen to cost 2 to 5 microseconds.
    """
    if of_parts and has_rows(op + OF_PARTS, k, capability):
        op += OF_PARTS
    elif of_parts:
        return _released_late(config(op, k, m, capability))
    limits, configs = _rows(op, k, capability)
    return configs[bisect_left(limits, m)]


def has_rows(op: str, k: int, capability: tuple[int, int] | None) -> bool:
    """Whether the table of a compute capability has configs of `op` for rows of k values."""
    return capability is not None and str(k) in _table(capability).get(op, {})


@cache
def _released_late(config: Config) -> Config:
    return replace(config, release="loaded")


def configs(op: str, k: int, capability: tuple[int, int] | None) -> list[Config]:
    """Every config that `op` has for rows of k values, however many rows there are."""
    return list(dict.fromkeys(_rows(op, k, capability)[1]))


@cache
def _rows(op: str, k: int, capability: tuple[int, int] | None) -> tuple[list[int], list[Config]]:
    # The largest M of each row but the last, which has no upper limit, and the rows' configs.
    table = _table(capability).get(op, {}).get(str(k), []) if capability else []
    rows = [read_row(row) for row in table] or [(m, _rule(op, k, m, has_clusters(capability))) for m in _RULE_LIMITS]
    rows[-1] = sys.maxsize, rows[-1][1]
    if kept := rows_kept(op, k):
        rows = _keeping(kept, rows)
    return [limit for limit, _ in rows[:-1]], [config for _, config in rows]


def rows_kept(op: str, k: int) -> int:
    """Up to how many rows `op` has keep_sum."""
    return KEPT_SUM // (2 * k) if op.startswith("add_") else 0


def _keeping(m: int, rows: list[tuple[int, Config]]) -> list[tuple[int, Config]]:
    # The same rows with keep_sum up to M, the row over it cut in two.
    below = [limit for limit, _ in rows if limit < m]
    kept = [(min(limit, m), replace(config, keep_sum=True)) for limit, config in rows[: len(below) + 1]]
    return kept + [row for row in rows if row[0] > m]


def read_row(row: ConfigRow) -> tuple[int, Config]:
    """The largest M that a row of a table is for, and its config."""
    return row["up_to"], Config(**{name: value for name, value in row.items() if name != "up_to"})


def write_row(up_to: int, config: Config) -> ConfigRow:
    """The row of a table for a config, without its defaults; keep_sum is a rule by M, and in no table."""
    defaults = {field.name: field.default for field in fields(Config)} | {"keep_sum": config.keep_sum}
    return {"up_to": up_to, **{name: value for name, value in asdict(config).items() if value != defaults[name]}}


@cache
def _table(capability: tuple[int, int]) -> ConfigTable:
    file = resources.files("normquant.kernels") / "config_tables" / f"sm{capability[0]}{capability[1]}.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def read_again() -> None:
    """Have this process see a table that was written since it read it."""
    _table.cache_clear()
    _rows.cache_clear()


_RULE_LIMITS = (16, 128, 256, 257)  # up to how many rows the rule gives one config; the last is all above


def _rule(op: str, k: int, m: int, clusters: bool) -> Config:
    # Few long rows: each over several programs, so that one row's latency is short. Else, few rows: many warps. Many
    # rows: fewer warps and no idle lanes, so that several programs share a multiprocessor.
    per_warp = 512 if m <= 256 else 1024
    num_warps = min(32, power_of_two_in(max(4, k // per_warp)))
    if "rms_norm" in op and k >= 4096:
        if clusters and m <= 128:  # 8 values a thread, a load of 16 bytes
            return Config(power_of_two(-(-k // MAX_CLUSTER)) // 256, split=MAX_CLUSTER, cluster=True)
        if m <= 16:
            return Config(num_warps, split=4)
    return Config(num_warps, tiles=1 if m <= 256 else 3)
