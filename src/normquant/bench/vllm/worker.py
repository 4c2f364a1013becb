"""One process of `normquant bench vllm`: `python -m normquant.bench.vllm.worker JOB.json`.

It starts vLLM, compares the logits with float32, writes a line, waits for a line on its standard input, measures, and
writes a line for each figure. Lines are JSON objects on the standard output; everything else goes to standard error.
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
from normquant.bench.vllm import float32_model, kernel_profile, seeded_model
from normquant.bench.vllm.engine import Engine, EngineStep, counted_scales, expert_kernels, linear_kernels, synchronize
from normquant.bench.vllm.job import PROMPT, WARM_UP, Job, engine_arguments, read
from normquant.bench.vllm.kernel_profile import CLASSES
from normquant.vllm.fp8_linear import flashinfer_version

Send = Callable[[dict[str, Any]], None]
LOAD_FORMAT = "normquant_bench"
SETTLE_S = 1.0  # of work before a wall time: this process was waiting for the others, with the GPU idle
CALLS = 60  # lines in a listing of Python calls
SHORT = 8  # tokens of a prompt when only scales are counted


def main(path: str) -> None:
    """Do the job that `path` describes."""
    send = lines()
    job = read(Path(path))
    engine, loaded = start(job)
    warm_up(engine, job)
    send({"kind": "ready", **facts(engine), **compare(engine, job, loaded), **check_scales(engine, job)})
    if sys.stdin.readline().strip() != "go":
        return
    measure(engine, job, send)
    send({"kind": "done"})


def lines() -> Send:
    """A function that writes a line to the present standard output; later prints go to standard error."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def send(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    return send


def start(job: Job) -> tuple[Engine, dict[str, torch.Tensor]]:
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
    engine = Engine(LLM(load_format=LOAD_FORMAT, **engine_arguments(job)))
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


def compare(engine: Engine, job: Job, loaded: dict[str, torch.Tensor]) -> dict[str, Any]:
    """How far the logits are from those of float32, at the end of prompts and at the token decoded after it.

    Half of the prompts are as long as those of a batch, which may run from CUDA graphs, and half are twice as long.
    logit_error: norm of the difference over norm of the reference, all prompts together; also of each position's own
    the 10th and 90th percentile.
    """
    prompts = [random_prompt(PROMPT * (1 + i % 2) - i % 8, job.model["vocab_size"], i) for i in range(job.compared)]
    found, texts = [], []
    for prompt in prompts:  # alone: the order of several in a batch is vLLM's own
        with engine.logits() as rows:
            engine.add(prompt, 2)
            (tokens,) = engine.finish()
        if [tuple(row.shape) for row in rows] != [(1, job.model["vocab_size"])] * 2:
            raise ValueError(f"a prompt and a token gave logits {[tuple(row.shape) for row in rows]}")
        found += rows
        texts.append([*prompt, tokens[0]])
    device = next(engine.model.parameters()).device
    full = float32_model.logits(job.model, lambda name: seeded_model.float32(loaded, name, device), texts)
    expected = torch.cat([part[-2:].cpu() for part in full])  # [2 * prompts, vocabulary]
    logits = torch.cat(found)
    each = statistics.quantiles(((logits - expected).norm(dim=1) / expected.norm(dim=1)).tolist(), n=10)
    return {
        "logit_error": round(float((logits - expected).norm() / expected.norm()), 6),
        "logit_error_p10": round(each[0], 6),
        "logit_error_p90": round(each[-1], 6),
        "logit_spread": float(expected.std()),
    }


def check_scales(engine: Engine, job: Job) -> dict[str, int]:
    """How many scales reach DeepGEMM while a few prompts run and decode, and how many are not powers of two."""
    with engine.without_graphs(), counted_scales() as counts:
        for batch in job.batches:
            for _ in range(batch):
                engine.add(random_prompt(SHORT, job.model["vocab_size"], batch), 3)
            engine.finish()
    return {"scales": counts.scales, "scales_not_power_of_two": counts.others}


def measure(engine: Engine, job: Job, send: Send) -> None:
    """Wall times first: once a profiler has run, every later launch is slower."""
    ms = {str(length): prefill_ms(engine, job, length) for length in job.prefill}
    tpot = {batch: step_ms(engine, job, batch) for batch in job.batches}
    replay = {batch: replay_us(engine, job, batch) for batch in job.batches}
    for length in job.prefill:
        keep_calls(job, f"prefill-{length}-calls", partial(prefill, engine, job, length))
    send({"kind": "prefill", "ms": ms, "gpu_us": {str(n): prefill_us(engine, job, n) for n in job.prefill}})
    for batch in job.batches:
        step = {"kind": "batch", "batch": batch, "tpot_ms": tpot[batch], "replay_us": replay[batch]}
        send(step | profile_batch(engine, job, batch))


def prefill_ms(engine: Engine, job: Job, length: int) -> float:
    """Wall time of a prompt of `length` tokens."""
    run = partial(prefill, engine, job, length)
    settled = time.monotonic() + SETTLE_S
    while time.monotonic() < settled:
        run()
    return round(statistics.median(timed(run) for _ in range(2 * job.samples)) * 1e3, 3)


def prefill_us(engine: Engine, job: Job, length: int) -> float:
    """Microseconds of the GPU of a prompt of `length` tokens."""
    prefill(engine, job, length)
    runs = [kernel_profile.recorded(lambda: prefill(engine, job, length)) for _ in range(job.samples)]
    keep(job, f"prefill-{length}", kernel_profile.by_name(runs[-1], 1))
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


def step_ms(engine: Engine, job: Job, batch: int) -> float:
    """Wall time of a step that decodes `batch` requests."""
    with decoding(engine, job, batch):
        windows = [timed(lambda: decode(engine, batch, job.steps)) for _ in range(job.samples)]
    return round(statistics.median(windows) / job.steps * 1e3, 4)


def replay_us(engine: Engine, job: Job, batch: int) -> float | None:
    """GPU time of the captured step, replayed back to back with no host in between; None where none was captured.

    The replays write again what the last step of the batch wrote.
    """
    with decoding(engine, job, batch):
        graph = engine.decode_graph(batch)
        if graph is None:
            return None
        return round(statistics.median(replayed(graph, job.steps) for _ in range(job.samples)), 2)


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


def profile_batch(engine: Engine, job: Job, batch: int) -> dict[str, Any]:
    """Figures of a step that decodes `batch` requests, of windows with no prompt in them."""
    with decoding(engine, job, batch):
        runs = [kernel_profile.recorded(lambda: decode(engine, batch, job.steps)) for _ in range(job.samples)]
    windows = [kernel_profile.window(kernels, job.steps) for kernels in runs]
    keep(job, f"decode-{batch}", kernel_profile.by_name(runs[-1], job.steps))
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


def random_prompt(length: int, vocabulary: int, seed: int) -> list[int]:
    """Tokens of a prompt, without the two that mark the beginning and the end of a text."""
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = torch.randint(2, vocabulary, (length,), generator=generator).tolist()
    return tokens


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
    main(sys.argv[1])
