"""The layer on a real GPU: both compiles timed, and every fused op compared with the graph that it replaced."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from normquant.bench import timing
from normquant.bench.timing import Timing
from normquant.compile.recording import record
from normquant.compile.verify import Checks, check_sites
from normquant.demo.deepseek_layer import Dims, build, forward, inputs
from normquant.linear import HOPPER

TOKENS = (1, 16, 64, 1024)
CHECKED_TOKENS = 1024
COPY_BYTES = 1 << 28
FIRST_WITH_FP8 = (8, 9)
STOCK, FUSED, EMPTY, COPY = "stock", "normquant", "one-element kernel", "copy"


@dataclass(frozen=True)
class Times:
    """The whole layer on `tokens` tokens of one sequence, microseconds a call."""

    tokens: int
    stock: Timing
    fused: Timing

    @property
    def speedup(self) -> float:
        return self.stock.us / self.fused.us


@dataclass(frozen=True)
class OnGpu:
    """One GPU. empty_us: a one-element kernel, timed the same way; copy_gbps: what a large copy reads and writes.

    fp8_gemm: whether the linears run as FP8 matrix products there; dequantized ones take far longer than the norms.
    """

    name: str
    fp8_gemm: bool
    times: tuple[Times, ...]
    empty_us: float
    copy_gbps: float
    checks: Checks


def why_not() -> str:
    """Why nothing can be timed on this machine; "" where it can."""
    if not torch.cuda.is_available():
        return "This machine shows no CUDA GPU."
    if torch.version.hip:
        return "This torch is built for ROCm; the kernels are written for CUDA."
    capability = torch.cuda.get_device_capability()
    if capability < FIRST_WITH_FP8:
        given, needed = (".".join(map(str, c)) for c in (capability, FIRST_WITH_FP8))
        return f"The {torch.cuda.get_device_name()} has no FP8: compute capability {given}, and {needed} is needed."
    return ""


def measure(
    dims: Dims,
    options: Callable[[], dict[str, Any]],
    progress: Callable[[str], None],
    tokens: Sequence[int] = TOKENS,
    device: str = "cuda",
) -> OnGpu:
    """Check and time the layer on `device`; `options` makes the Inductor options of a fused compile."""
    name = torch.cuda.get_device_name(device)
    progress(f"comparing the fused ops with the replaced graph on the {name}, {CHECKED_TOKENS} tokens")
    layers = timing.modules_past_l2(lambda seed: build(dims, device, seed), device)
    checks = check_sites(record(forward, (layers[0], *inputs(dims, CHECKED_TOKENS, device)), options()).only)
    times, found = [], {}
    for count in tokens:
        progress(f"timing the layer on {count} {'token' if count == 1 else 'tokens'}, stock and with normquant")
        found = _time(dims, layers, count, options(), device)
        times.append(Times(count, found[STOCK], found[FUSED]))
    fp8_gemm = torch.cuda.get_device_capability(device) == HOPPER
    return OnGpu(name, fp8_gemm, tuple(times), found[EMPTY].us, 2 * COPY_BYTES / found[COPY].us / 1e3, checks)


def _time(
    dims: Dims, layers: list[torch.nn.Module], tokens: int, options: dict[str, Any], device: str
) -> dict[str, Timing]:
    """Both compiles and the two reference rows, interleaved; every call uses the next layer's weights and inputs."""
    sets = [(layer, *inputs(dims, tokens, device, seed)) for seed, layer in enumerate(layers)]
    one, source = torch.zeros(1, device=device), torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    torch._dynamo.reset()  # Dynamo keeps only a few compiled versions of a function
    try:
        with torch.no_grad():
            return timing.time_calls(
                {
                    STOCK: _calls(sets),
                    FUSED: _calls(sets, options=options),
                    EMPTY: [functools.partial(one.add_, 1)],
                    COPY: [functools.partial(target.copy_, source)],
                }
            )
    finally:
        torch._dynamo.reset()


def _calls(sets: list[tuple[Any, ...]], **how: Any) -> list[Callable[[], Any]]:
    """The compiled layer on each set; fullgraph, so that a fallback to eager is an error, not a measurement."""
    compiled = torch.compile(forward, dynamic=False, fullgraph=True, **how)
    for arguments in sets:  # compiles before a graph is captured
        compiled(*arguments)
    return [functools.partial(compiled, *arguments) for arguments in sets]
