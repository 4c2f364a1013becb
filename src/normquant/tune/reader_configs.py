"""Launch configs of the ops that read partial sums, each timed behind the product that makes them.

Alone, an op may let the next kernel come early; here that is a product, whose programs take much shared memory, and
come when the op has loaded its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby

import torch

from normquant.bench.cases import Case
from normquant.bench.precompile import Told, everywhere
from normquant.bench.products import ProductCase, ProductInputs, product_inputs, reader_width
from normquant.bench.timing import Call, Timing, sets_needed, time_calls
from normquant.kernels.configs import OF_PARTS, Config, ConfigTable
from normquant.linear.split_product import launch_pair
from normquant.ops import OPS
from normquant.tune import launch_configs
from normquant.tune.launch_configs import SAMPLE_US


def read(cases: Sequence[ProductCase]) -> list[ProductCase]:
    """Those whose product is read by an op that has launch configs, each op and width once for each M.

    Two products may have readers of one width, as those of the attention's output and of the MLP: the larger counts.
    """
    found = {}
    for case in sorted(cases, key=lambda case: case.k):
        if case.reader and OPS[case.reader].configs:
            found[case.reader, reader_width(case), case.m] = case
    return [found[key] for key in sorted(found)]


def candidates(case: ProductCase) -> list[Config]:
    """The configs worth measuring."""
    shapes = launch_configs.candidates(Case(case.reader, case.m, reader_width(case)))
    return list(dict.fromkeys(replace(shape, release="loaded") for shape in shapes if not shape.prefetch))


def calls(case: ProductCase, config: Config, i: ProductInputs) -> list[Call]:
    """The product and its reader with a config, for each weight."""
    others = [value for value in i.rest if isinstance(value, torch.Tensor)]
    product = i.data, i.scale, *i.weights[0], torch.bfloat16
    launch = launch_pair(OPS[case.reader], product, i.rest, config)
    return [partial(launch, i.data, i.scale, *weight, *others) for weight in i.weights]


def precompile(cases: Sequence[ProductCase], told: Told = lambda done, of: None) -> str | None:
    """Compile every candidate into Triton's cache; what went wrong, if something did."""
    wanted = {(c.reader, c.k, c.n, config): (c, config) for c in read(cases) for config in candidates(c)}
    return everywhere(launch_once, list(wanted.values()), told=told)


def launch_once(case: ProductCase, config: Config) -> None:
    """Launch a config, which compiles it."""
    calls(case, config, product_inputs(case, 1))[0]()
    torch.cuda.synchronize()


def measure(case: ProductCase, samples: int) -> dict[Config, Timing]:
    """Times of the product and its reader, by the reader's config."""
    i = product_inputs(case, sets_needed(case.n * case.k))
    configs = candidates(case)
    timings = time_calls({str(at): calls(case, c, i) for at, c in enumerate(configs)}, samples, SAMPLE_US)
    return {config: timings[str(at)] for at, config in enumerate(configs)}


def tune(cases: Sequence[ProductCase], samples: int, progress: Callable[[str], None]) -> ConfigTable:
    """The configs of every op that reads a product of the cases; `progress` is told each result."""
    table: ConfigTable = {}
    for (op, width), same in groupby(read(cases), key=lambda case: (case.reader, reader_width(case))):
        measured = []
        for case in same:
            times = measure(case, samples)
            best = min(times, key=lambda config: times[config].us)
            progress(f"{case.k}x{case.n} -> {op} m={case.m}: {times[best].us:.2f} us with {best}")
            measured.append((case.m, times))
        table.setdefault(OPS[op].configs + OF_PARTS, {})[str(width)] = launch_configs.choose(measured)
        torch.cuda.empty_cache()
    return table
