"""`normquant bench layer`: whole decoder layers compiled stock, with nested reductions where torch has them, fused."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from normquant.bench import models
from normquant.bench.compiling import any_rows, no_recompile_limit
from normquant.bench.records import LayerRecord, current_run, time_fields
from normquant.bench.timing import Call, Timing, sets_needed, time_calls
from normquant.compile import inductor_options
from normquant.version import VERSION

MS = (1, 16, 64, 1024, 8192)


def settings() -> dict[str, dict[str, Any]]:
    """Inductor options by setting."""
    import torch._inductor.config as inductor

    found: dict[str, dict[str, Any]] = {"stock": {}, "normquant": inductor_options(policy="always")}
    if hasattr(inductor.triton, "nested_reduction"):
        found["nested"] = {"triton.nested_reduction": True}
    return found


def measure(name: str, ms: Sequence[int], samples: int) -> Iterator[LayerRecord]:
    """Records of a model at each M, the settings interleaved; one compile a setting serves every M above one."""
    layers = [models.build(name, "cuda")]
    weights = sum(t.nbytes for t in (*layers[0].parameters(), *layers[0].buffers()))
    layers += [models.build(name, "cuda", seed) for seed in range(1, sets_needed(weights))]
    compiled = {
        setting: torch.compile(models.forward, fullgraph=True, options=options)
        for setting, options in settings().items()
    }
    for m in ms:
        with torch.no_grad(), no_recompile_limit():
            work = {setting: calls(run, layers, name, m) for setting, run in compiled.items()}
            counts = {setting: kernels(run[0]) for setting, run in work.items()}
            timings = time_calls(work, samples)
        for setting, timing in timings.items():
            yield record(name, setting, m, timing, counts[setting])


def calls(run: Callable[..., torch.Tensor], layers: Sequence[torch.nn.Module], name: str, m: int) -> list[Call]:
    """One call a layer, each with inputs of its own, compiled."""
    found: list[Call] = []
    for seed, layer in enumerate(layers):
        sample = models.inputs(name, m, "cuda", seed)
        any_rows(sample, dim=1)
        found.append(functools.partial(run, layer, *sample))
        found[-1]()
    return found


def kernels(call: Call) -> int:
    """GPU kernels of one call."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    return sum(e.count for e in seen.key_averages() if not e.key.startswith(("Memcpy", "Memset", "cuda")))


def record(name: str, setting: str, m: int, timing: Timing, count: int) -> LayerRecord:
    """One record."""
    run = asdict(current_run(VERSION))
    return LayerRecord("layer", name, setting, m, **time_fields(timing, 2), kernels=count, **run)
