"""`normquant tune --linear`: how products of few rows are split and launched, and where they are chosen.

First every product is timed with each split and launch config that may pay. A split decides bits and is one for all
numbers of rows and all GPUs, so the one is taken whose best configs are the fastest over all of them. Then the ops that
read products get their configs (`reader_configs`). At last the product, alone and with the op that reads it, is timed
beside its peers; what is not the fastest there is not chosen.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, product
from pathlib import Path
from typing import Any

import torch

from normquant.bench.precompile import Told, everywhere
from normquant.bench.products import OURS, ProductCase, ProductInputs, measure_products, product_inputs
from normquant.bench.timing import Call, Timing, sets_needed, time_calls
from normquant.kernels import product_configs
from normquant.kernels.product_configs import (
    BLOCK,
    COLUMNS,
    MAX_SPLIT,
    ProductConfig,
    rows_of_program,
    split_in_table,
    without_empty_parts,
    write_product_row,
)
from normquant.linear import choice
from normquant.linear.choice import PRODUCT
from normquant.tune.launch_configs import NOISE

FEWEST, MOST = 60, 800  # programs of a split that is worth measuring; where none has so many, the largest splits
SAMPLE_US = 300.0
Way = tuple[int, ProductConfig]  # a split, and how its kernel is launched
Times = Mapping[tuple[str, str], float]  # (provider, part) -> microseconds, as in records of the bench


@dataclass(frozen=True)
class TunedProduct:
    """What was found for a product: its split and its rows of launch configs. us: by number of rows."""

    k: int
    n: int
    split: int
    rows: tuple[product_configs.ProductRow, ...]
    us: Mapping[int, float]

    @property
    def tables(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Its entries of the table of splits and of that of launch configs."""
        name = f"{self.k}x{self.n}"
        return {name: self.split}, {name: list(self.rows)}

    @property
    def text(self) -> str:
        times = ", ".join(f"m={m} {us:.2f} us" for m, us in self.us.items())
        return f"{self.k}x{self.n} in {self.split} parts: {times}"


def ways(k: int, n: int) -> list[Way]:
    """The splits and configs worth measuring. A split that is in the table stays: another would change results."""
    known = split_in_table(k, n)
    shapes = ((4, COLUMNS[0]), (4, COLUMNS[1]), (8, COLUMNS[1]))
    configs = [ProductConfig(warps, wide, stages) for (warps, wide), stages in product(shapes, (3, 4, 6))]
    return list(product([known] if known else splits(k, n), configs))


def splits(k: int, n: int) -> list[int]:
    """The splits worth measuring."""
    blocks, columns = k // BLOCK, -(-n // COLUMNS[0])
    found = sorted({without_empty_parts(k, split) for split in range(1, min(MAX_SPLIT, blocks) + 1)})
    return [split for split in found if FEWEST <= columns * split <= MOST] or found[-2:]


def launches(case: ProductCase, way: Way, i: ProductInputs) -> list[Call]:
    """A launch for each weight."""
    from normquant.kernels.block_fp8_linear import plan_block_fp8_linear
    from normquant.kernels.launch import Launch

    split, config = way
    launch = Launch(plan_block_fp8_linear(i.data, i.scale, *i.weights[0], config=config, split=split))
    return [partial(launch, i.data, i.scale, *weight) for weight in i.weights]


def precompile(cases: Sequence[ProductCase], told: Told = lambda done, of: None) -> str | None:
    """Compile every way of every product into Triton's cache; what went wrong, if something did.

    `told` is told how far it is.
    """
    wanted = {(c.k, c.n, rows_of_program(c.m), way): (c, way) for c in cases for way in ways(c.k, c.n)}
    return everywhere(launch_once, list(wanted.values()), told=told)


def launch_once(case: ProductCase, way: Way) -> None:
    """Launch a way, which compiles it."""
    launches(case, way, product_inputs(replace(case, reader=""), 1))[0]()
    torch.cuda.synchronize()


def times_of(case: ProductCase, samples: int) -> dict[Way, Timing]:
    """Times of every way to make the partial sums of a product, the sum of two parts and more included.

    Whoever reads P parts reads 4 P M N bytes from the L2; that is counted by the sum's kernel, which does the same.
    """
    i = product_inputs(replace(case, reader=""), sets_needed(case.n * case.k))
    found = ways(case.k, case.n)
    work = {str(at): _with_sum(case, way, i) for at, way in enumerate(found)}
    timings = time_calls(work, samples, SAMPLE_US)
    return {way: timings[str(at)] for at, way in enumerate(found)}


def _with_sum(case: ProductCase, way: Way, i: ProductInputs) -> list[Call]:
    from normquant.kernels.launch import Launch
    from normquant.kernels.partial_rows import PartialRows
    from normquant.kernels.sum_of_parts import plan_sum_of_parts

    rows = PartialRows(case.m, case.n, way[0], torch.bfloat16, i.data.device)
    add = Launch(plan_sum_of_parts(rows))

    def run(call: Call) -> None:
        add(*call())  # type: ignore[misc]

    return [partial(run, call) for call in launches(case, way, i)]


def tune(cases: Sequence[ProductCase], samples: int) -> Iterator[TunedProduct]:
    """The split and the configs of every product of the cases."""
    for (k, n), same in groupby(sorted(cases, key=_shape), key=_shape):
        measured = {case.m: times_of(case, samples) for case in sorted(same, key=lambda c: c.m)}
        yield choose(k, n, measured)
        torch.cuda.empty_cache()


def choose(k: int, n: int, measured: Mapping[int, Mapping[Way, Timing]]) -> TunedProduct:
    """The split whose best configs are the fastest over all numbers of rows, each compared with the best at that one;
    and for it rows of configs, in which a neighbour's is kept unless another is faster by more than the noise."""
    splits = {split for times in measured.values() for split, _ in times}

    def best(m: int, split: int | None = None) -> tuple[ProductConfig, float]:
        us = {way: t.us for way, t in measured[m].items() if split is None or way[0] == split}
        way = min(us, key=lambda way: us[way])
        return way[1], us[way]

    def slowdown(split: int) -> float:
        return statistics.geometric_mean(best(m, split)[1] / best(m)[1] for m in measured)

    split = min(sorted(splits), key=slowdown)
    rows: list[product_configs.ProductRow] = []
    us, before = {}, None
    for m in measured:
        config, fastest = best(m, split)
        if before is not None and measured[m][split, before].us <= fastest * (1 + NOISE):
            config = before
        us[m], before = measured[m][split, config].us, config
        row = write_product_row(m, config)
        if rows and rows[-1] | {"up_to": m} == row:
            rows.pop()
        rows.append(row)
    return TunedProduct(k, n, split, tuple(rows), us)


def compare(cases: Sequence[ProductCase], names: Sequence[str], samples: int) -> Iterator[dict[str, Any]]:
    """Entries of the table that chooses: each product alone, and with its reader; ours and all named beside it."""

    def times(case: ProductCase) -> Times:
        return {(provider, part): t.us for provider, part, t, _ in measure_products(case, names, samples)}

    ascending = sorted(cases, key=lambda c: (*_shape(c), c.reader, c.m))
    return entries_of((case, times(case)) for case in ascending)


def entries_of(measured: Iterable[tuple[ProductCase, Times]]) -> Iterator[dict[str, Any]]:
    """Entries of the table that chooses, from times.

    A product's cases come one after the other, by rows: an entry speaks for all rows above those of the one before.
    """
    before = None
    for case, times in measured:
        first = before.m + 1 if before is not None and replace(before, m=case.m) == case else 1
        for part, what in (("product", PRODUCT), ("pair", case.reader)):
            us = {provider: round(t, 2) for (provider, of), t in times.items() if of == part}
            if OURS in us and len(us) > 1:
                yield {"part": what, "k": case.k, "n": case.n, "m": [first, case.m], "us": us}
        before = case


def _shape(case: ProductCase) -> tuple[int, int]:
    return case.k, case.n


def merged(
    table: dict[str, Any], entries: Sequence[dict[str, Any]], capability: tuple[int, int], command: str
) -> dict[str, Any]:
    """A table with these entries in place of those of the same products; others are kept."""
    measured = {(e["part"], e["k"], e["n"]) for e in entries}
    kept = [e for e in table.get("entries", []) if (e["part"], e["k"], e["n"]) not in measured]
    every = sorted([*kept, *entries], key=lambda e: (e["part"], e["k"], e["n"], e["m"]))
    return {"capability": "{}.{}".format(*capability), "source": command, "entries": every}


def write(path: Path, table: Mapping[str, Any]) -> None:
    """Write the table that chooses, one line an entry."""
    head = json.dumps({name: table[name] for name in ("capability", "source")})[:-1]
    lines = ",\n".join("  " + json.dumps(e) for e in table["entries"])
    path.write_text(f'{head}, "entries": [\n{lines}\n]}}\n')


def paths(capability: tuple[int, int]) -> tuple[Path, Path, Path]:
    """Where the tables of splits, of launch configs and of choices lie in this installation."""
    name = f"sm{capability[0]}{capability[1]}.json"
    kernels = Path(product_configs.__file__).parent / "product_tables"
    return kernels / "splits.json", kernels / name, Path(choice.__file__).parent / "tables" / name


def read_again() -> None:
    """Have this process see tables that were written since it read them."""
    product_configs._splits.cache_clear()
    product_configs._configs.cache_clear()
