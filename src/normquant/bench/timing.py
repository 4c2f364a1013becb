"""GPU time of a call, as a serving engine with CUDA graphs would see it.

A provider is captured into a CUDA graph that calls it many times in a row, each time on the next of several sets of
inputs. Together, the sets (at most 64) are larger than the L2, so that every call finds its inputs in DRAM; or they are
kept well within it. Providers take turns replaying their graphs in one process, so that clocks and temperature drift
over all of them alike. Each replay is one raw sample.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from normquant.bench.cases import Case

Call = Callable[[], object]
SAMPLE_US = 1000.0  # length of one sample: long beside a graph's launch of some 10 microseconds
MAX_SETS = 64
MAX_CALLS = 1024  # in one graph


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: median, 10th and 90th percentile of n samples, a sample being one graph replay."""

    us: float
    us_p10: float
    us_p90: float
    n: int


def sets_needed(bytes_read: int, device: torch.device | str = "cuda") -> int:
    """How many input sets of `bytes_read` make up five times the L2; at least two, at most 64."""
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(MAX_SETS, -(-5 * l2 // bytes_read)))


def modules_past_l2(
    build: Callable[[int], torch.nn.Module], device: torch.device | str = "cuda"
) -> list[torch.nn.Module]:
    """Modules built from the seeds 0, 1, ...: as many as it takes for their weights to come from DRAM."""
    first = build(0)
    weights = sum(t.nbytes for t in (*first.parameters(), *first.buffers()))
    return [first, *(build(seed) for seed in range(1, sets_needed(weights, device)))]


def sets_of(case: Case, in_l2: bool) -> int:
    """Input sets for a case: in_l2: few enough to stay in the L2, like the output of the previous kernel."""
    return sets_in_l2(case.bytes) if in_l2 else sets_needed(case.traffic[0])


def sets_in_l2(bytes_moved: int, device: torch.device | str = "cuda") -> int:
    """How many input sets fit, with their outputs, into half of the L2; at least two, at most 64."""
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(MAX_SETS, l2 // 2 // bytes_moved))


def time_calls(
    providers: Mapping[str, Sequence[Call]], samples: int = 21, sample_us: float = SAMPLE_US
) -> dict[str, Timing]:
    """Time each provider, a list of calls that do the same work on different input sets, the providers interleaved.

    sample_us: length of one sample, in microseconds.
    """
    # Nothing reads what the graphs write and one runs at a time, so their outputs can share memory: hundreds of launch
    # configs of a large case would not fit otherwise.
    pool = torch.cuda.graph_pool_handle()
    graphs = {name: capture(calls, sample_us, pool) for name, calls in providers.items()}
    raw = interleaved([graph for graph, _ in graphs.values()], samples)
    found = zip(graphs.items(), raw, strict=True)
    return {name: summary([us / calls for us in values]) for (name, (_, calls)), values in found}


def interleaved(graphs: Sequence[torch.cuda.CUDAGraph], samples: int) -> list[list[float]]:
    """Microseconds of each replay of each graph, the graphs taking turns."""
    raw: list[list[float]] = [[] for _ in graphs]
    for graph in graphs:  # a first replay uploads the graph
        graph.replay()
    torch.cuda.synchronize()
    for _ in range(samples):
        for graph, values in zip(graphs, raw, strict=True):
            values.append(replay_us(graph))
    return raw


def capture(calls: Sequence[Call], sample_us: float, pool: Any) -> tuple[torch.cuda.CUDAGraph, int]:
    """A CUDA graph of the calls in turn, repeated to about `sample_us`, and how many calls it holds.

    pool: the memory for what is allocated in the graph, as `torch.cuda.graph_pool_handle` gives it.
    """
    with _side_stream() as stream:
        for call in calls:  # compiles and allocates outside of the graph
            call()
        once = _record(calls, 1, stream, pool)
        once.replay()
        us = min(replay_us(once) for _ in range(3))
        repeats = max(1, min(MAX_CALLS // len(calls), round(sample_us / us)))
        graph = _record(calls, repeats, stream, pool)
    return graph, repeats * len(calls)


def capture_once(call: Call) -> torch.cuda.CUDAGraph:
    """A CUDA graph of one call, which is run once before the capture."""
    return capture_repeated([call], 1)


def capture_repeated(calls: Sequence[Call], repeats: int, pool: Any = None) -> torch.cuda.CUDAGraph:
    """A CUDA graph of the calls in turn, `repeats` times, after one run of each; pool: as in `capture`."""
    with _side_stream() as stream:
        for call in calls:  # compiles and allocates outside of the graph
            call()
        return _record(calls, repeats, stream, pool)


@contextmanager
def _side_stream() -> Iterator[torch.cuda.Stream]:
    # A graph is captured on a stream of its own, which waits for earlier work; later work waits for it.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield stream
    torch.cuda.current_stream().wait_stream(stream)


def _record(calls: Sequence[Call], repeats: int, stream: torch.cuda.Stream, pool: Any = None) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream, pool=pool):
        for _ in range(repeats):
            for call in calls:
                call()
    return graph


def replay_us(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds of one replay."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e3


def summary(samples: Sequence[float]) -> Timing:
    """Median, 10th and 90th percentile."""
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    return Timing(statistics.median(samples), deciles[0], deciles[-1], len(samples))


def middle_mean(samples: Sequence[float]) -> float:
    """Interquartile mean: with a lower variance than the median, and insensitive to outliers."""
    quarter = len(samples) // 4
    return statistics.fmean(sorted(samples)[quarter : len(samples) - quarter])
