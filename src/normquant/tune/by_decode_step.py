"""`normquant tune --decode`: launch configs by what they do to the time of a whole decode step.

A row of calls of one kernel, as `tune` times it, says little about its place in a model, where a GEMM comes before and
after: an early release costs there what it saves here, and a prefetch the other way round. So a config is timed by the
step with it in every layer, against the step with the present configs, the two in turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from normquant.bench import shard_step
from normquant.bench.cases import MS, Case
from normquant.bench.precompile import Told, everywhere
from normquant.bench.shard_step import DEEPSEEK_R1, LAYERS, SPEC, Layer, StepInputs
from normquant.bench.timing import capture_once, interleaved, middle_mean
from normquant.kernels import configs, tiling
from normquant.kernels.configs import RELEASES, Config, ConfigRow, ConfigTable, read_row
from normquant.ops import OPS
from normquant.tune.decode_step import Configs, Gemm, step_of
from normquant.tune.launch_configs import PREFETCH_UP_TO, PROGRAMS, clusters, joined, launch_once

DECODE_MS = (1, 16, 64)
REPLAYS = 100
BATCH = 24  # variants that take turns with the present configs: more, and clocks drift within a turn
MARGIN_US = 0.05  # a layer: a config must win by more to displace the present one, so that the table stays short
TOGETHER = 4  # times as many replays for the two steps that are reported
WARPS = (8, 16, 32)  # of a norm over the hidden width
FEW_WARPS = (1, 2, 4, 8)  # of the narrower ops
WHOLE_READ = 4  # programs at the most that each read a norm's whole row; more of them are a cluster
PER_THREAD = (2, 64)  # values of the groups that a program writes, or of the row that a norm's reads

Times = Callable[[Sequence[Configs]], list[float]]  # us a layer of the step with each


@dataclass(frozen=True)
class Trial:
    """us a layer that a config saves over the present ones, and by how much these differ among themselves."""

    config: Config
    gain: float
    noise: float


@dataclass(frozen=True)
class StepResult:
    """us a layer with the present configs and with the chosen ones; `configs` are the faster of the two."""

    m: int
    present_us: float
    chosen_us: float
    configs: Configs


def present_configs(widths: Mapping[str, int], m: int, capability: tuple[int, int] | None) -> dict[str, Config]:
    """The configs that a step of m tokens has now."""
    return {op: configs.config(op, k, m, capability) for op, k in widths.items()}


def candidates(op: str, k: int, m: int, present: Config) -> list[Config]:
    """The configs worth measuring, the present one first; all keep x + residual in the L2 as the present one does."""
    prefetches = (False, True) if "prefetch" in OPS[op].choices and m <= PREFETCH_UP_TO else (False,)
    found = [present]
    for shape in shapes(op, k, m):
        for prefetch in prefetches:
            for release in RELEASES:
                found.append(replace(shape, prefetch=prefetch, release=release, keep_sum=present.keep_sum))
    return list(dict.fromkeys(found))


def shapes(op: str, k: int, m: int) -> Iterator[Config]:
    """Numbers of warps and splits that leave no thread without work, nor with more than fits its registers."""
    normed = bool(OPS[op].choices)
    least, most = PER_THREAD
    for split in (1, 2, 4, 8, 16):
        if split > k // SPEC.group or (normed and split > 1 and (split > WHOLE_READ or split * m > PROGRAMS)):
            continue
        own = tiling.own_groups(k, SPEC, Config(4, split))[0] * SPEC.group
        for num_warps in WARPS if "cluster" in OPS[op].choices else FEW_WARPS:
            if least <= (k if normed else own) / (32 * num_warps) <= most:
                yield Config(num_warps, split)
    yield from clusters(Case(op, m, k, spec=SPEC))


def precompile(ms: Sequence[int], capability: tuple[int, int], told: Told = lambda done, of: None) -> str | None:
    """Compile every candidate into Triton's cache, telling how far it is; returns what went wrong, if something did."""
    wanted: dict[tuple[str, Config], int] = {}
    for m in ms:
        for op, config in present_configs(DEEPSEEK_R1.widths, m, capability).items():
            k = DEEPSEEK_R1.widths[op]
            wanted |= {(op, candidate): k for candidate in candidates(op, k, m, config)}
    work = [(Case(op, 2, k, spec=SPEC), config) for (op, config), k in wanted.items()]
    return everywhere(launch_once, work, told=told)


def trials(op: str, configs: Sequence[Config], present: Configs, times: Times) -> list[Trial]:
    """Each config of an op against the present ones of all ops, in batches with three steps of the present ones."""
    found = []
    for first in range(0, len(configs), BATCH):
        batch = configs[first : first + BATCH]
        half = len(batch) // 2
        variants: list[Configs] = [{**present, op: config} for config in batch]
        us = times([present, *variants[:half], present, *variants[half:], present])
        bases = [us.pop(0), us.pop(half), us.pop()]
        base, noise = sum(bases) / 3, max(bases) - min(bases)
        found += [Trial(config, base - value, noise) for config, value in zip(batch, us, strict=True)]
    return found


def choose(found: Sequence[Trial], present: Config) -> Config:
    """The best config of those that win by more than the noise and the margin; the present one where none does."""
    winners = [trial for trial in found if trial.gain > max(trial.noise, MARGIN_US)]
    return max(winners, key=lambda trial: trial.gain).config if winners else present


def tune_rows(
    m: int, widths: Mapping[str, int], present: Configs, times: Times, together: Times, progress: Callable[[str], None]
) -> StepResult:
    """The configs of a step of m tokens: those of one op at a time, then all against the present ones.

    times, together: us a layer of steps, the second of those that are reported.
    """
    chosen = dict(present)
    for op, k in widths.items():
        found = trials(op, candidates(op, k, m, present[op]), present, times)
        chosen[op] = choose(found, present[op])
        progress(f"{op} k={k} m={m}: {outcome(found, chosen[op], present[op])}")
    before, after = together([present, chosen])
    lost = chosen != present and after >= before  # wins that do not add up
    left_out = ", which are left out" if lost else ""
    progress(f"m={m}: {before:.1f} us a layer, {after:.1f} with the chosen configs{left_out}")
    return StepResult(m, before, after, present if lost else chosen)


def outcome(found: Sequence[Trial], chosen: Config, present: Config) -> str:
    """A set of candidates as a line of text."""
    best = max(found, key=lambda trial: trial.gain)
    if chosen == present:
        return f"{present} stays, the best of {len(found)} saves {best.gain:.2f} us a layer, noise {best.noise:.2f}"
    trial = next(trial for trial in found if trial.config == chosen)
    return f"{chosen} saves {trial.gain:.2f} us a layer, noise {trial.noise:.2f}"


def tune(ms: Sequence[int], replays: int, gemm: Gemm, progress: Callable[[str], None]) -> list[StepResult]:
    """Measure steps of each number of tokens on this GPU, ascending; `progress` is told each result."""
    capability = torch.cuda.get_device_capability()
    progress(f"a decode step of {LAYERS} layers of DeepSeek-R1, one of eight shards; GEMM: {gemm.name}")
    layers = shard_step.layers(DEEPSEEK_R1, LAYERS, gemm.layout)
    found = []
    for m in sorted(set(ms)):
        run = partial(run_with, layers, gemm, shard_step.inputs(DEEPSEEK_R1, m))
        times = partial(layer_us, run, len(layers), replays)
        together = partial(layer_us, run, len(layers), TOGETHER * replays)
        configs = present_configs(DEEPSEEK_R1.widths, m, capability)
        found.append(tune_rows(m, DEEPSEEK_R1.widths, configs, times, together, progress))
        torch.cuda.empty_cache()
    return found


def run_with(layers: tuple[Layer, ...], gemm: Gemm, inputs: StepInputs, configs: Configs) -> object:
    """A step with these configs."""
    return shard_step.run(step_of(layers, gemm, configs), inputs)


def layer_us(run: Callable[[Configs], object], count: int, replays: int, variants: Sequence[Configs]) -> list[float]:
    """us a layer of a step of `count` layers with each of the configs, the steps in turns."""
    graphs = [capture_once(partial(run, configs)) for configs in variants]
    return [middle_mean(values) / count for values in interleaved(graphs, replays)]


def merged(
    table: ConfigTable, found: Sequence[StepResult], widths: Mapping[str, int], capability: tuple[int, int]
) -> ConfigTable:
    """The table with the rows of the ops in a step replaced as far as they were measured; `found` ascends in m."""
    new = {op: dict(rows) for op, rows in table.items()}
    for op, k in widths.items():
        rows = new.get(op, {}).get(str(k)) or in_use(op, k, capability)
        new.setdefault(op, {})[str(k)] = merged_rows(rows, [(result.m, result.configs[op]) for result in found])
    return new


def in_use(op: str, k: int, capability: tuple[int, int] | None) -> list[ConfigRow]:
    """What the kernels choose, as rows of a table: for an op and width that the table at hand lacks."""
    return joined([(m, configs.config(op, k, m, capability)) for m in MS])


def merged_rows(rows: Sequence[ConfigRow], measured: Sequence[tuple[int, Config]]) -> list[ConfigRow]:
    """Rows of a table with the measured configs up to the largest measured M, ascending in M.

    A config holds from the last measured M, exclusive, to its own. Above the largest every M keeps its config, where
    the last row held for all M beyond it.
    """
    last = measured[-1][0]
    above = [(limit, config) for limit, config in map(read_row, rows) if limit > last]
    return joined([*measured, *(above or [(last + 1, read_row(rows[-1])[1])])])
