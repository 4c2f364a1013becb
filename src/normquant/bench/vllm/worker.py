"""One process of `normquant bench vllm`: `python -m normquant.bench.vllm.worker JOB.json [RANK PORT]`.

Of a job on several GPUs it is the first rank, and starts the others with a rank and the port at which they meet.
It starts vLLM, compares the logits with float32 and writes a line. Asked on its standard input for "wall" it measures
wall times and writes a line, as often as it is asked; asked for "kernels" it measures what the GPU does, writes a line
for each figure, and ends. Lines are JSON objects on the standard output; everything else goes to standard error.
"""

from __future__ import annotations

import contextlib
import cProfile
import json
import os
import pstats
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from normquant.bench.timing import summary
from normquant.bench.vllm import kernel_profile, seeded_model
from normquant.bench.vllm.checks import check_scales, compare, random_prompt
from normquant.bench.vllm.engine import (
    ALONE,
    Engine,
    EngineStep,
    expert_kernels,
    linear_kernels,
    synchronize,
)
from normquant.bench.vllm.job import PROMPT, WARM_UP, Job, engine_arguments, read
from normquant.bench.vllm.kernel_profile import CLASSES
from normquant.bench.vllm.rank_processes import OtherRanks, Ranks, free_port, launcher_environment
from normquant.vllm.fp8_linear import flashinfer_version

Send = Callable[[dict[str, Any]], None]
COMMAND = (sys.executable, "-m", "normquant.bench.vllm.worker")
LOAD_FORMAT = "normquant_bench"
SETTLE_S = 1.0  # of work before a wall time: this process was waiting for the others, with the GPU idle
CORES = 4  # of each rank, while wall times are measured
CALLS = 60  # lines in a listing of Python calls


def main(path: str, rank: str = "0", port: str = "") -> None:
    """Do the job that `path` describes."""
    send = lines()
    job = read(Path(path))
    ranks, others = Ranks(int(rank), job.tensor_parallel), None
    if ranks.world > 1:
        port = port or str(free_port())
        if not ranks.rank:
            others = OtherRanks([[*COMMAND, path, str(r), port] for r in range(1, ranks.world)])
        os.environ.update(launcher_environment(ranks.rank, ranks.world, int(port)))
    engine, loaded = start(job, ranks)
    warm_up(engine, job)
    send({"kind": "ready", **facts(engine), **compare(engine, job, loaded), **check_scales(engine, job)})
    while asked := sys.stdin.readline().strip():
        if others is not None:
            others.ask(asked)
        if asked == "wall":
            send({"kind": "wall", **wall_times(engine, job)})
            continue
        measure_kernels(engine, job, send)
        send({"kind": "done"})
        break
    if others is not None:
        others.stop()


def lines() -> Send:
    """A function that writes a line to the present standard output; later prints go to standard error. The lines of
    ranks other than the first end in the log."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def send(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    return send


def start(job: Job, ranks: Ranks = ALONE) -> tuple[Engine, dict[str, torch.Tensor]]:
    """vLLM with the job's setting, and the weights that it was given.

    Raises ValueError if it chose another linear kernel, or if FlashInfer is missing, which pip installs beside vLLM.
    """
    if job.installed and find_spec("flashinfer") is None:
        raise ValueError("FlashInfer is not installed; as pip installs vLLM it is there, and decides over the kernels")
    if job.plugin:
        from normquant.vllm.plugin import register

        register()  # where normquant is on the path and not installed, vLLM finds no entry point
    from vllm import LLM

    loaded: dict[str, torch.Tensor] = {}
    register_loader(loaded)
    engine = Engine(LLM(load_format=LOAD_FORMAT, **engine_arguments(job)), ranks)
    kernels = linear_kernels(engine.model)
    if not kernels or not (job.installed or all(name.lower().startswith(job.linear) for name in kernels)):
        raise ValueError(f"vLLM chose {', '.join(sorted(kernels)) or 'no kernel'} for the linears, not {job.linear}")
    return engine, loaded


def register_loader(loaded: dict[str, torch.Tensor]) -> None:
    """Register a load format with vLLM that generates the weights and leaves copies of them in `loaded`."""
    from vllm.model_executor.model_loader import BaseModelLoader, register_model_loader

    @register_model_loader(LOAD_FORMAT)
    class Loader(BaseModelLoader):
        def download_model(self, model_config: Any) -> None:
            """There is nothing to download."""

        def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
            loaded.update(seeded_model.fill(model))


def facts(engine: Engine) -> dict[str, Any]:
    """Where it runs, and what vLLM chose."""
    import triton
    import vllm

    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "vllm": vllm.__version__,
        "flashinfer": flashinfer_version(),
        "linear_kernels": sorted(linear_kernels(engine.model)),
        "expert_kernels": sorted(expert_kernels(engine.model)),
    }


def warm_up(engine: Engine, job: Job) -> None:
    """Run each measured shape once, so that compiling for it happens now, while other processes start as well."""
    for length in job.prefill:
        prefill(engine, job, length)
    for batch in job.batches:
        for request in range(batch):
            engine.add(random_prompt(PROMPT, job.model["vocab_size"], request), 4)
        engine.finish()


def wall_times(engine: Engine, job: Job) -> dict[str, dict[str, float]]:
    """Milliseconds of each prompt, and of a step of each batch. No profiler has run: later launches would be slower."""
    settled = time.monotonic() + SETTLE_S
    with on_fixed_cores(engine.ranks.rank):
        while engine.ranks.agreed(time.monotonic() < settled):
            for length in job.prefill:
                prefill(engine, job, length)
        return {
            "prefill_ms": {str(length): prefill_ms(engine, job, length) for length in job.prefill},
            "tpot_ms": {str(batch): step_ms(engine, job, batch) for batch in job.batches},
        }


@contextlib.contextmanager
def on_fixed_cores(rank: int) -> Iterator[None]:
    """Within, this thread runs on the same cores in every setting's process. The GPU waits for Python in short steps,
    and how long Python takes differs between the cores of a large host by more than between settings."""
    allowed = os.sched_getaffinity(0)
    chosen = sorted(allowed)[rank * CORES : (rank + 1) * CORES]
    os.sched_setaffinity(0, chosen or allowed)
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def prefill_ms(engine: Engine, job: Job, length: int) -> float:
    """Wall time of a prompt of `length` tokens: the median of three."""
    return round(statistics.median(timed(partial(prefill, engine, job, length)) for _ in range(3)) * 1e3, 3)


def step_ms(engine: Engine, job: Job, batch: int) -> float:
    """Wall time of a step that decodes `batch` requests, in a window of them."""
    with decoding(engine, job, batch):
        seconds = timed(lambda: decode(engine, batch, job.steps))
    return round(seconds / job.steps * 1e3, 4)


def measure_kernels(engine: Engine, job: Job, send: Send) -> None:
    """What the GPU does: captured steps alone, prompts and steps by kernel."""
    captured = {batch: captured_step(engine, job, batch) for batch in job.batches}
    for length in job.prefill:
        keep_calls(job, f"prefill-{length}-calls{engine.ranks.suffix}", partial(prefill, engine, job, length))
    send({"kind": "prefill", "gpu_us": {str(length): prefill_us(engine, job, length) for length in job.prefill}})
    for batch in job.batches:
        send({"kind": "batch", "batch": batch, **captured[batch], **profile_batch(engine, job, batch)})


def prefill_us(engine: Engine, job: Job, length: int) -> float:
    """Microseconds of the GPU of a prompt of `length` tokens."""
    prefill(engine, job, length)
    runs = [kernel_profile.recorded(lambda: prefill(engine, job, length)) for _ in range(job.samples)]
    keep(job, f"prefill-{length}{engine.ranks.suffix}", kernel_profile.by_name(runs[-1], 1))
    return round(statistics.median(kernel_profile.window(kernels, 1).us for kernels in runs), 1)


def prefill(engine: Engine, job: Job, length: int) -> None:
    """One prompt and its first token. Raises ValueError if vLLM ran it in parts."""
    before = len(engine.steps)
    engine.add(random_prompt(length, job.model["vocab_size"], length), 1)
    engine.finish()
    if engine.steps[before:] != [EngineStep(1, length)]:
        raise ValueError(f"a prompt of {length} tokens ran as {engine.steps[before:]}")


@contextlib.contextmanager
def decoding(engine: Engine, job: Job, batch: int) -> Iterator[None]:
    """Within: `batch` requests, every step decodes one token of each. Afterwards they are gone."""
    before = len(engine.steps)
    for request in range(batch):
        engine.add(random_prompt(PROMPT, job.model["vocab_size"], request), job.decoded)
    while EngineStep(batch, batch) not in engine.steps[before:]:
        engine.step()
    decode(engine, batch, WARM_UP)
    yield
    engine.finish()


def captured_step(engine: Engine, job: Job, batch: int) -> dict[str, float | None]:
    """The captured step alone: replayed back to back with no host in between, on the slowest rank, and the CPU's time
    to launch it on an idle GPU; None where none was captured.

    The replays write again what the last step of the batch wrote.
    """
    with decoding(engine, job, batch):
        keep_calls(job, f"decode-{batch}-calls{engine.ranks.suffix}", lambda: decode(engine, batch, job.steps))
        graph = engine.decode_graph(batch)
        if graph is None:
            return {"replay_us": None, "launch_us": None}
        times = []
        for _ in range(job.samples):
            engine.ranks.meet()
            times.append(engine.ranks.slowest(replayed(graph, job.steps)))
        launches = [engine.ranks.slowest(launched(graph)) for _ in range(job.steps)]
        return {"replay_us": round(statistics.median(times), 2), "launch_us": round(statistics.median(launches), 2)}


def replayed(graph: torch.cuda.CUDAGraph, times: int) -> float:
    """Microseconds of one of so many replays."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    start.record()
    for _ in range(times):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / times


def launched(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds of the CPU until a replay is launched; it has ended on return."""
    start = time.perf_counter()
    graph.replay()
    us = (time.perf_counter() - start) * 1e6
    synchronize()
    return us


def profile_batch(engine: Engine, job: Job, batch: int) -> dict[str, Any]:
    """Figures of a step that decodes `batch` requests, of windows with no prompt in them."""
    with decoding(engine, job, batch):
        runs = [kernel_profile.recorded(lambda: decode(engine, batch, job.steps)) for _ in range(job.samples)]
    windows = [kernel_profile.window(kernels, job.steps) for kernels in runs]
    keep(job, f"decode-{batch}{engine.ranks.suffix}", kernel_profile.by_name(runs[-1], job.steps))
    us = summary([w.us for w in windows])
    return {
        "gpu_us_per_step": round(us.us, 2),
        "us_p10": round(us.us_p10, 2),
        "us_p90": round(us.us_p90, 2),
        "n": us.n,
        "sum_us_per_step": round(statistics.median(w.sum_us for w in windows), 2),
        "classes": {c: round(statistics.median(w.classes.get(c, 0.0) for w in windows), 2) for c in CLASSES},
        "kernels": round(statistics.median(w.kernels for w in windows)),
    }


def decode(engine: Engine, batch: int, steps: int) -> None:
    """So many steps. Raises ValueError if one of them was anything but one token for each request of the batch."""
    before = len(engine.steps)
    for _ in range(steps):
        engine.step()
    ran = engine.steps[before:]
    if ran != [EngineStep(batch, batch)] * steps:
        raise ValueError(f"{steps} steps that decode {batch} requests ran as {ran}")


def timed(run: Callable[[], object]) -> float:
    """Seconds of a call, with the GPU's work in it."""
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def keep(job: Job, name: str, kernels: Sequence[tuple[str, str, float, float]]) -> None:
    """The kernels of the last window, in the job's folder."""
    text = "\n".join(f"{us:10.2f} us {count:8.2f} x  {cls:<11} {kernel}" for cls, kernel, count, us in kernels)
    (Path(job.folder) / f"{name}.txt").write_text(text + "\n")


def keep_calls(job: Job, name: str, run: Callable[[], object]) -> None:
    """Where a call spends the CPU's time, by Python function, in the job's folder."""
    profiler = cProfile.Profile()
    profiler.runcall(run)
    with (Path(job.folder) / f"{name}.txt").open("w") as file:
        pstats.Stats(profiler, stream=file).sort_stats("tottime").print_stats(CALLS)


if __name__ == "__main__":
    main(*sys.argv[1:])
