"""`normquant tune`: measures launch configs on this GPU and writes the table that `kernels/configs.py` reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from normquant import specs
from normquant.bench.cases import Case, CaseInputs, inputs
from normquant.bench.precompile import Told, everywhere
from normquant.bench.timing import Call, Timing, sets_of, time_calls
from normquant.kernels import capability, configs, tiling
from normquant.kernels.configs import Config, ConfigRow, ConfigTable, write_row
from normquant.kernels.tiling import divided
from normquant.spec import QuantSpec

NOISE = 0.01  # a config must win by more than this to displace a neighbour's, so that the table stays short
PROGRAMS = 512  # a row is split only as long as there are no more programs than this, some four a multiprocessor
PREFETCH_UP_TO = 64  # rows: above, a prefetch competes with the loads of the kernel before
EVICT_FROM = 256  # rows: fewer are together small beside the L2
SEVERAL_FROM = 512  # rows: from here a program may take several
CLUSTER_VALUES = (8, 16)  # values of a thread where programs are clusters: one load of 16 bytes, or two
SAMPLE_US = 300.0


def candidates(case: Case) -> list[Config]:
    """The configs worth measuring."""
    shapes = [*plain(case), *clusters(case)]
    if not case.definition.choices:
        return shapes
    keep_sum = case.m <= configs.rows_kept(case.op_name, case.k)
    return [replace(config, keep_sum=keep_sum) for shape in shapes for config in variants(case, shape)]


def present_and_clusters(case: Case) -> list[Config]:
    """The config that the case has on this GPU, and those of its candidates whose programs are clusters."""
    present = configs.config(case.op_name, case.k, case.m, torch.cuda.get_device_capability())
    return list(dict.fromkeys([present, *(config for config in candidates(case) if config.cluster)]))


def plain(case: Case) -> Iterator[Config]:
    """Numbers of warps, splits and rows: from 4 to 64 values a thread, and rows split only where they are few."""
    groups, independent = case.k // case.spec.group, not case.definition.choices  # programs take any groups
    splits = [s for s in (1, 2, 4, 8, 16) if s <= groups and (independent or s == 1 or s * case.m <= PROGRAMS)]
    shapes = [(split, 1) for split in splits]
    if case.m >= SEVERAL_FROM:
        shapes += [(1, rows) for rows in (2, 4, 8, 16)]
    for split, rows in shapes:
        for num_warps in (1, 2, 4, 8, 16, 32):
            per_thread = (case.k // split if independent else case.k) * rows / (32 * num_warps)
            if 4 <= per_thread <= (64 if rows == 1 else 32):  # more of several rows spill
                yield Config(num_warps, split, rows)


def clusters(case: Case) -> list[Config]:
    """Numbers of warps and splits in which the programs of a row are a cluster, which only norms have."""
    shapes: dict[tuple[int, int], Config] = {}
    if "cluster" in case.definition.choices:
        for split in (2, 4, capability.MAX_CLUSTER):
            block, programs = tiling.own_groups(case.k, case.spec, Config(4, split))
            for per_thread in CLUSTER_VALUES:
                num_warps = block * case.spec.group // (32 * per_thread)
                if programs > 1 and 1 <= num_warps <= 32 and (split < capability.MAX_CLUSTER or case.m < EVICT_FROM):
                    shapes.setdefault((num_warps, block), Config(num_warps, split, cluster=True))
    return list(shapes.values())


def variants(case: Case, shape: Config) -> list[Config]:
    """A config of an op with a norm, and the same with each choice that may pay for so many rows."""
    found = [shape]
    if "prefetch" in case.definition.choices and case.m <= PREFETCH_UP_TO:
        found.append(replace(shape, prefetch=True))
        if shape.cluster:  # which leaves much of the GPU to the next kernel
            found.append(replace(shape, prefetch=True, release="start"))
    if case.m >= SEVERAL_FROM:
        found.append(replace(shape, late_weight=True))
    if shape.split > 1 and not shape.cluster:
        return found
    if case.m >= EVICT_FROM:
        found += [replace(config, evict_first=True) for config in found]
    if shape.cluster:
        return found
    return found + [replace(config, tiles=n) for config in found for n in tilings(case)]


def tilings(case: Case) -> list[int]:
    """Numbers of tiles, above one, that cut a row of the case in different ways."""
    known = {divided(case.k, case.spec, Config(4)).tiles: 1}
    for tiles in (2, 3):
        known.setdefault(divided(case.k, case.spec, Config(4, tiles=tiles)).tiles, tiles)
    return list(known.values())[1:]


def rules(case: Case) -> list[QuantSpec]:
    """The arithmetic that a config is timed with: where x + residual is rounded before the norm, as models do, some are
    10 to 25 % slower than others, at the same DRAM traffic."""
    if case.residual and case.m >= EVICT_FROM:
        return [case.spec, specs.HF.replace(layout=case.spec.layout)]
    return [case.spec]


def calls(case: Case, config: Config, data: Sequence[CaseInputs]) -> list[Call]:
    """A launch with a config for each set of inputs, planned once for all of them."""
    from normquant.kernels.launch import Launch

    launched = Launch(case.definition.plan(*data[0].values(), case.spec, config=config))
    return [partial(launched, *(t for t in given.values() if isinstance(t, torch.Tensor))) for given in data]


def measure(
    case: Case, samples: int, in_l2: bool = False, candidates: Callable[[Case], Iterable[Config]] = candidates
) -> dict[Config, Timing]:
    """Times of all candidates on one case, with inputs from DRAM or, in_l2, such as stay in the L2.

    A candidate's time is that of the slower of the case's `rules`.
    """
    under = rules(case)
    data = inputs(case, sets_of(case, in_l2))
    configs = list(candidates(case))
    work = {
        f"{rule} {n}": calls(replace(case, spec=spec), config, data)
        for rule, spec in enumerate(under)
        for n, config in enumerate(configs)
    }
    timings = time_calls(work, samples, SAMPLE_US)
    return {
        config: max((timings[f"{rule} {n}"] for rule in range(len(under))), key=lambda timing: timing.us)
        for n, config in enumerate(configs)
    }


def precompile(
    cases: Sequence[Case],
    candidates: Callable[[Case], Iterable[Config]] = candidates,
    told: Told = lambda done, of: None,
) -> str | None:
    """Compile every candidate of every (op, K) into Triton's cache, since compiling is most of tuning.

    `told` is told how far it is.
    Returns what went wrong, if something did; what is missing is compiled when it is measured.
    """
    wanted = {
        (case.op_name, case.k, spec, config): replace(case, m=2, spec=spec)
        for case in cases
        for spec in rules(case)
        for config in candidates(case)
    }
    return everywhere(launch_once, [(case, config) for (*_, config), case in wanted.items()], told=told)


def launch_once(case: Case, config: Config) -> None:
    """Launch a config, which compiles it."""
    calls(case, config, inputs(case, 1))[0]()
    torch.cuda.synchronize()


def choose(measured: Sequence[tuple[int, dict[Config, Timing]]]) -> list[ConfigRow]:
    """Rows of a table from measurements at ascending M; the last row holds for every larger M.

    A row keeps its neighbour's config unless another is faster by more than the noise.
    """
    chosen: list[tuple[int, Config]] = []
    for m, times in measured:
        best = min(times, key=lambda config: times[config].us)
        previous = chosen[-1][1] if chosen else best
        if previous in times and times[previous].us <= times[best].us * (1 + NOISE):
            best = previous
        chosen.append((m, best))
    return joined(chosen)


def joined(chosen: Sequence[tuple[int, Config]]) -> list[ConfigRow]:
    """Rows of a table from (M, config) at ascending M, neighbours with one config as one row."""
    rows: list[ConfigRow] = []
    for m, config in chosen:
        row = write_row(m, config)
        if rows and rows[-1] | {"up_to": m} == row:
            rows[-1] = row
        else:
            rows.append(row)
    return rows


def table_path(capability: tuple[int, int]) -> Path:
    """Where the table of a compute capability lies in this installation."""
    import normquant.kernels

    return Path(normquant.kernels.__path__[0]) / "config_tables" / f"sm{capability[0]}{capability[1]}.json"


def write(path: Path, table: ConfigTable) -> None:
    """Write the table, one line for each row."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(_braces("", (f'"{op}": {_widths(table[op])}' for op in sorted(table))) + "\n")


def _widths(rows: dict[str, list[ConfigRow]]) -> str:
    return _braces("  ", (f'"{k}": {_braces("    ", map(json.dumps, rows[k]), "[]")}' for k in sorted(rows, key=int)))


def _braces(indent: str, items: Iterable[str], braces: str = "{}") -> str:
    return braces[0] + "\n" + ",\n".join(f"{indent}  {item}" for item in items) + f"\n{indent}" + braces[1]


def tune(
    cases: Sequence[Case],
    samples: int,
    progress: Callable[[str], None],
    in_l2: bool = False,
    candidates: Callable[[Case], Iterable[Config]] = candidates,
) -> ConfigTable:
    """Measure all cases and build the table; `progress` is told each result."""
    measured: dict[tuple[str, int], list[tuple[int, dict[Config, Timing]]]] = {}
    for case in sorted(cases, key=lambda c: (c.op_name, c.k, c.m)):
        times = measure(case, samples, in_l2, candidates)
        measured.setdefault((case.op_name, case.k), []).append((case.m, times))
        best = min(times, key=lambda config: times[config].us)
        progress(f"{case.op_name} k={case.k} m={case.m}: {times[best].us:.2f} us with {best}")
        torch.cuda.empty_cache()
    table: ConfigTable = {}
    for (op, k), rows in measured.items():
        table.setdefault(op, {})[str(k)] = choose(rows)
    return table
