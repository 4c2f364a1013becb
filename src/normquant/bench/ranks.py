"""`normquant bench kernels --ranks N`: an all-reduce, the residual add, the norm and the quantization, on N GPUs.

Every rank is a process. All ranks replay the same graph back to back with no host work in between, and the slowest
rank's time counts: a step that is profiled alone measures how late the other ranks were.
"""

from __future__ import annotations

import os
import queue
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from normquant import distributed, reference
from normquant.bench import rank_providers
from normquant.bench.cases import Case
from normquant.bench.records import RanksRecord, current_run, timing_fields
from normquant.bench.timing import Call, capture_repeated, replay_us, summary
from normquant.version import VERSION

EPS = 1e-6
CALLS = 48  # in a graph
SETS = 8  # of inputs, as they come from a GEMM: in the L2


@dataclass(frozen=True)
class RankInputs:
    """x: this rank's part, [M, K]; residual and weight are the same on all ranks."""

    x: torch.Tensor
    residual: torch.Tensor
    weight: torch.Tensor


def inputs(m: int, k: int, rank: int, sets: int, seed: int = 0) -> list[RankInputs]:
    """`sets` different sets of inputs, bf16, with one weight."""
    own = torch.Generator("cuda").manual_seed(1000 * seed + rank + 1)
    shared = torch.Generator("cuda").manual_seed(seed)

    def randn(generator: torch.Generator) -> torch.Tensor:
        return torch.randn(m, k, generator=generator, device="cuda", dtype=torch.bfloat16)

    weight = torch.rand(k, generator=shared, device="cuda").add_(0.5).bfloat16()
    return [RankInputs(randn(own), randn(shared), weight) for _ in range(sets)]


def join(rank: int, world: int, port: int) -> dist.ProcessGroup:
    """Make this process a rank, on the GPU of that number."""
    torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl",
        f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world,
        device_id=torch.device("cuda", rank),
        timeout=timedelta(seconds=120),
    )
    group = dist.group.WORLD
    assert group is not None
    return group


def measure(
    case: Case, group: dist.ProcessGroup, providers: Mapping[str, rank_providers.Make], samples: int
) -> Iterator[RanksRecord]:
    """Records of all providers on a case; every rank of the group calls this and gets the same."""
    sets = inputs(case.m, case.k, group.rank(), SETS)
    runs: dict[str, rank_providers.Run] = {}
    for name, make in providers.items():
        run = agreed(lambda make=make: make(case, group), group)  # type: ignore[misc]
        if run is not None:
            runs[name] = run
    matches = {name: check(case, group, run) for name, run in runs.items()}
    calls = {name: [lambda i=i, run=run: run(i) for i in sets] for name, run in runs.items()}
    for name, times in time_ranks(calls, group, samples).items():
        timing = summary(times)
        yield RanksRecord(
            suite="kernels", op="all_reduce_add_rms_norm_quant", m=case.m, k=case.k, group=case.spec.group,
            layout=case.spec.layout, scale=case.spec.scale, residual=True, normed=False, provider=name, inputs="l2",
            **timing_fields(timing, case.bytes), pct_of_copy=None, match=matches[name], ranks=group.size(),
            **asdict(current_run(VERSION)),
        )  # fmt: skip


def agreed(make: Callable[[], Any], group: dist.ProcessGroup) -> Any:
    """What `make` returns, or None on all ranks where it raised or returned None on any."""
    try:
        made = make()
    except Exception as error:
        print(f"rank {group.rank()}: left out, {type(error).__name__}: {str(error)[:200]}", flush=True)
        made = None
    there: list[bool] = [False] * group.size()
    dist.all_gather_object(there, made is not None, group=group)
    return made if all(there) else None


def check(case: Case, group: dist.ProcessGroup, run: rank_providers.Run) -> str:
    """How the data of a provider compares with the sum in rank order and the reference, over all ranks."""
    sample = inputs(case.m, case.k, group.rank(), 1, seed=1)[0]
    parts = torch.stack([inputs(case.m, case.k, r, 1, seed=1)[0].x for r in range(group.size())])
    expected = reference.all_reduce_add_rms_norm_quant(parts, sample.residual, sample.weight, EPS, case.spec)[0]
    data = run(RankInputs(sample.x.clone(), sample.residual.clone(), sample.weight))
    differ = (data.view(torch.uint8) != expected.view(torch.uint8)).sum()
    dist.all_reduce(differ, op=dist.ReduceOp.MAX, group=group)
    return "bitwise" if not differ.item() else f"{differ.item()} of {data.numel()} values differ"


def time_ranks(calls: Mapping[str, Sequence[Call]], group: dist.ProcessGroup, samples: int) -> dict[str, list[float]]:
    """Microseconds a call, the slowest rank's, of each sample; the providers take turns."""
    pool = torch.cuda.graph_pool_handle()
    graphs = {}
    for name, some in calls.items():
        dist.barrier(group)
        with rank_providers.capturing(group):
            graphs[name] = capture_repeated(some, CALLS // len(some), pool)
    raw: dict[str, list[float]] = {name: [] for name in calls}
    for sample in range(samples + 1):
        for name, graph in graphs.items():
            torch.cuda.synchronize()
            dist.barrier(group)
            graph.replay()  # brings the ranks into step
            us = replay_us(graph) / (CALLS // len(calls[name]) * len(calls[name]))
            if sample:
                raw[name].append(us)
    names = list(raw)
    times = torch.tensor([raw[name] for name in names], device="cuda")  # [providers, samples]
    dist.all_reduce(times, op=dist.ReduceOp.MAX, group=group)
    return dict(zip(names, times.tolist(), strict=True))


def run_rank(
    rank: int, world: int, port: int, cases: Sequence[Case], names: Sequence[str] | None, samples: int, results: Any
) -> None:
    """One rank of a benchmark; the first puts the records of each case, and None at the end, into `results`."""
    group = join(rank, world, port)
    providers = rank_providers.named(names)
    for k in sorted({case.k for case in cases}):
        distributed.open_workspace(group, k, one_shot_rows=rank_providers.ONE_SHOT_LIMIT)
        for case in (case for case in cases if case.k == k):
            records = list(measure(case, group, providers, samples))
            if rank == 0:
                results.put(records)
    if rank == 0:
        results.put(None)
    torch.cuda.synchronize()
    dist.barrier(group)
    os._exit(0)  # NCCL and its graphs take seconds to take down, and nothing is left to lose


def on_ranks(
    world: int, cases: Sequence[Case], names: Sequence[str] | None, samples: int
) -> Iterator[list[RanksRecord]]:
    """The records of each case, measured by `world` processes; raises RuntimeError where one of them ends early."""
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    ranks = [
        context.Process(target=run_rank, args=(r, world, port, cases, names, samples, results), daemon=True)
        for r in range(world)
    ]
    for process in ranks:
        process.start()
    try:
        while (records := _next(results, ranks)) is not None:
            yield records
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _next(results: Any, ranks: Sequence[Any], timeout_s: float = 300.0) -> list[RanksRecord] | None:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        try:
            return results.get(timeout=1.0)
        except queue.Empty:
            if ended := [r for r, process in enumerate(ranks) if process.exitcode not in (None, 0)]:
                raise RuntimeError(f"rank {ended[0]} ended with exit code {ranks[ended[0]].exitcode}") from None
    raise RuntimeError(f"no rank has measured anything for {timeout_s:.0f} s")


def line(records: Sequence[RanksRecord]) -> str:
    """One case as a line of text."""
    first = records[0]
    times = "  ".join(f"{r.provider} {r.us:.2f}{'' if r.match == 'bitwise' else '*'}" for r in records)
    return f"ranks={first.ranks} m={first.m} k={first.k}: {times}"
