"""How a block-FP8 product of few rows is divided: what decides its bits, and what changes its speed only.

K is cut into parts, whose sums are added in their order by whoever reads them. That decides bits, so it depends on K
and N alone, never on M, on a config or on the GPU: a row has one result in every batch. All else is a `ProductConfig`.
Both come from a committed table, measured by the tuner; what it lacks follows a rule. Splits are in a table of their
own, which is the same on every GPU.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib import resources
from typing import Any

from normquant.kernels.configs import RELEASES
from normquant.kernels.tiling import power_of_two

BLOCK = 128  # values of K in one accumulation of the tensor core, and the side of a weight's block
FEW_ROWS = 64  # rows that the product is made for, and the most that one program takes
MIN_ROWS = 16  # of a program, which computes no fewer
COLUMNS = (64, 128)  # of N that a program may take: 64 is what the widest instruction of the tensor core needs
PROGRAMS = 264  # wanted by the rule: two for each multiprocessor of an H100
MAX_SPLIT = 16
MOST_PROGRAMS = 3  # of a product on one multiprocessor, for which it matters where they are
SHARED_UNIT, OWN_SHARED = 128, 1024  # bytes: of shared memory that are given out together, and that CUDA adds

ProductRow = dict[str, Any]  # {"up_to": largest M, field of a ProductConfig: value, ...}, without defaults


@dataclass(frozen=True)
class ProductConfig:
    """How a product is launched. Fields change its speed and no bit of its result.

    num_warps: warps of a program, 4 or 8: with fewer the tensor core would get another instruction, and other bits.
    columns: of N that a program takes, one of COLUMNS. stages: blocks of K that are on their way at a time.
    release: when the next kernel may be scheduled, one of RELEASES. The programs of a reader are small and find a place
        beside those of the product: with "start" they are there when the last part is.
    """

    num_warps: int = 4
    columns: int = 64
    stages: int = 4
    release: str = "start"

    def __post_init__(self) -> None:
        if self.num_warps not in (4, 8) or self.columns not in COLUMNS or not 1 <= self.stages <= 8:
            raise ValueError(f"{self}: 4 or 8 warps, {' or '.join(map(str, COLUMNS))} columns, 1 to 8 stages")
        if self.release not in RELEASES:
            raise ValueError(f"{self}: release is one of {', '.join(RELEASES)}")


def split_of(k: int, n: int) -> int:
    """In how many parts K is summed for N columns: that of the table, or else of the rule."""
    return split_in_table(k, n) or _split_rule(k, n)


def split_in_table(k: int, n: int) -> int | None:
    """The split of the table, None where it has none."""
    return _splits().get(f"{k}x{n}")


def blocks_of_part(k: int, split: int) -> int:
    """Blocks of K in each part but the last, which may have fewer."""
    return -(-(k // BLOCK) // split)


def without_empty_parts(k: int, split: int) -> int:
    """The number of parts that as many blocks each, at most, need: 12 blocks in 5 parts are 3 blocks in 4."""
    return -(-(k // BLOCK) // blocks_of_part(k, split))


def rows_of_program(m: int) -> int:
    """Rows that a program takes of m, a power of two."""
    return min(max(power_of_two(m), MIN_ROWS), FEW_ROWS)


def shared_memory(programs: int, multiprocessors: int, shared: int) -> int:
    """Bytes of shared memory for a program, so that no multiprocessor gets more of the programs than it has to.

    shared: bytes of shared memory of a multiprocessor. The programs of a product come while those of the kernel before
    it are at work. Where these have places to spare on some multiprocessors only, two or three came to one and none to
    others, which took up to half as long again (an H100). With more than three on each it comes to no difference.
    """
    most = -(-programs // multiprocessors) if multiprocessors else MOST_PROGRAMS + 1
    if most > MOST_PROGRAMS:
        return 0
    return -(-(shared // (most + 1) + 1) // SHARED_UNIT) * SHARED_UNIT - OWN_SHARED


def product_config(k: int, n: int, m: int, capability: tuple[int, int] | None) -> ProductConfig:
    """The config for [m, k] by [n, k] on a compute capability: the table's, else the defaults."""
    rows = _configs(capability).get(f"{k}x{n}", []) if capability else []
    if not rows:
        return ProductConfig()
    at = bisect_left([row["up_to"] for row in rows[:-1]], m)  # the last row holds for every larger M
    return read_product_row(rows[at])[1]


def read_product_row(row: ProductRow) -> tuple[int, ProductConfig]:
    """The largest M that a row of a table is for, and its config."""
    return row["up_to"], ProductConfig(**{name: value for name, value in row.items() if name != "up_to"})


def write_product_row(up_to: int, config: ProductConfig) -> ProductRow:
    """The row of a table for a config, without its defaults."""
    defaults = {field.name: field.default for field in fields(ProductConfig)}
    return {"up_to": up_to, **{name: value for name, value in asdict(config).items() if value != defaults[name]}}


def _split_rule(k: int, n: int) -> int:
    # As many parts as give the programs that are wanted, each of two blocks of K at the least.
    blocks, programs = k // BLOCK, -(-n // COLUMNS[0])
    wanted = max(1, min(PROGRAMS // programs, blocks // 2, MAX_SPLIT))
    return without_empty_parts(k, wanted)


@cache
def _splits() -> dict[str, int]:
    return _read("splits.json")


@cache
def _configs(capability: tuple[int, int]) -> dict[str, list[ProductRow]]:
    return _read(f"sm{capability[0]}{capability[1]}.json")


def _read(name: str) -> dict[str, Any]:
    file = resources.files("normquant.kernels") / "product_tables" / name
    return json.loads(file.read_text()) if file.is_file() else {}
