"""`normquant bench decode`: a decode step (`shard_step`) captured in a CUDA graph, by who multiplies in it. Providers:

    scaled_mm, deepgemm, flashinfer
               this product for all five of a layer, and the op that reads it in a kernel of its own
    best       for each of the five whichever of these was measured to be the fastest with its reader
    normquant  the pair of product and reader where that was measured to be the fastest, as the compile pass has it,
               elsewhere as `best`

"Measured" is the table by which products are chosen (`linear/choice.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from normquant.bench import shard_step
from normquant.bench.products import (
    DTYPE,
    OURS,
    PRODUCT_PROVIDERS,
    SHAPES,
    Multiply,
    ProductCase,
    product_inputs,
)
from normquant.bench.records import DecodeRecord, current_run, time_fields
from normquant.bench.shard_step import DEEPSEEK_R1, LAYERS, MODEL, SPEC, DecodeStep, Layer, Linear, StepInputs, Then
from normquant.bench.timing import Timing, time_calls
from normquant.linear import PAIRS, choose, dequantized_linear
from normquant.linear.choice import REMEDY, Wanted, measurement
from normquant.ops import OPS
from normquant.version import VERSION

TODAY = {name: provider for name, provider in PRODUCT_PROVIDERS.items() if name != OURS}
BEST = "best"
PRODUCTS = SHAPES["DeepSeek-R1"]  # K, N and reader of each product in a layer
CHECKED = 2  # layers whose outputs are compared: fp8 amplifies roundings, which after eight hide a wrong product
BOUND = 0.15  # of their error: 0.05 by rounding alone, however coarse; from 0.4 where one product is wrong
SAMPLE_US = 5000.0  # some ten steps


def call(op: str, *args: Any) -> tuple[torch.Tensor, ...]:
    """The outputs of an op."""
    return _as_tuple(OPS[op].overload(*args, SPEC.encode()))


def pair_or(otherwise: Then, wanted: Wanted = "auto") -> Then:
    """The pair of a product and an op where it is chosen; elsewhere what `otherwise` does."""

    def then(op: str, data: torch.Tensor, scale: torch.Tensor, linear: Linear, *args: Any) -> Any:
        if not choose(op, *_sizes(data, linear), data.device, wanted).split:
            return otherwise(op, data, scale, linear, *args)
        product = data, scale, linear.weight, linear.scale, DTYPE
        return _as_tuple(PAIRS[op].overload(*product, wanted, "", *args, SPEC.encode()))

    return then


def best_of(others: Mapping[str, Multiply]) -> Then:
    """The fastest of the others, and the op."""
    thens = {name: shard_step.followed(multiply, call) for name, multiply in others.items()}

    def then(op: str, data: torch.Tensor, scale: torch.Tensor, linear: Linear, *args: Any) -> Any:
        name = fastest(op, *_sizes(data, linear), data.device, thens)
        return thens[name](op, data, scale, linear, *args)

    return then


def fastest(op: str, k: int, n: int, m: int, device: torch.device, others: Collection[str]) -> str:
    """Which of the others was the fastest with the op behind it. Raises ValueError where none of them was measured."""
    entry = measurement(op, k, n, m, device)
    if entry is None:
        raise ValueError(f"{op} and its product: {choose(op, k, n, m, device).reason}")
    us = {name: time for name, time in entry.us if name in others}
    if not us:
        raise ValueError(f"{op}: {', '.join(others)} not measured for K={k}, N={n}, {entry.text}; {REMEDY}")
    return min(us, key=us.__getitem__)


def _sizes(data: torch.Tensor, linear: Linear) -> tuple[int, int, int]:
    """K, N, M."""
    (m, k), n = data.shape, linear.weight.shape[0]
    return k, n, m


def _as_tuple(outputs: Any) -> tuple[torch.Tensor, ...]:
    return (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)


def todays(names: Sequence[str]) -> dict[str, Multiply]:
    """The products of these names."""
    any_product = product_inputs(ProductCase(128, 128, 1, ""), 1)  # of which only ours takes notice
    return {name: TODAY[name].build(any_product) for name in names}


def steps(layers: tuple[Layer, ...], others: Mapping[str, Multiply]) -> dict[str, DecodeStep]:
    """The step of each provider."""
    best = best_of(others)
    thens = {name: shard_step.followed(multiply, call) for name, multiply in others.items()}
    thens |= {BEST: best, OURS: pair_or(best)}
    return {name: DecodeStep(DEEPSEEK_R1, layers, call, then) for name, then in thens.items()}


def checked_errors(steps: Mapping[str, DecodeStep], inputs: StepInputs) -> dict[str, float]:
    """Error of each after some layers. Raises RuntimeError for one that computes something else."""
    found = {name: error_of_step(replace(step, layers=step.layers[:CHECKED]), inputs) for name, step in steps.items()}
    wrong = [f"{name} {error:.3f}" for name, error in found.items() if not error <= BOUND]
    if wrong:
        raise RuntimeError(f"relative error after {CHECKED} layers above {BOUND}: {', '.join(wrong)}")
    return found


def error_of_step(step: DecodeStep, inputs: StepInputs) -> float:
    """Norm of the difference of the residual from that with products in float32, over that one's norm."""
    in_float32 = partial(dequantized_linear, out_dtype=DTYPE)
    reference = replace(step, then=shard_step.followed(in_float32, step.call))
    got, expected = (shard_step.run(s, inputs)[-1].double() for s in (step, reference))
    return float((got - expected).norm() / expected.norm())


def measure(ms: Sequence[int], names: Sequence[str], samples: int) -> Iterator[list[DecodeRecord]]:
    """For each number of tokens a record of each provider. Raises ValueError where `best` is unknown."""
    device = torch.device("cuda")
    for m in ms:
        for k, n, op in PRODUCTS:
            fastest(op, k, n, m, device, names)
    layers, others = shard_step.layers(DEEPSEEK_R1, LAYERS), todays(names)
    for m in ms:
        yield decode_records(steps(layers, others), shard_step.inputs(DEEPSEEK_R1, m), samples)


def decode_records(steps: Mapping[str, DecodeStep], inputs: StepInputs, samples: int) -> list[DecodeRecord]:
    """One record for each provider, after a check of all."""
    errors, run = checked_errors(steps, inputs), asdict(current_run(VERSION))
    timings = time_calls({name: [partial(shard_step.run, s, inputs)] for name, s in steps.items()}, samples, SAMPLE_US)
    found = []
    for name, step in steps.items():
        count, t = len(step.layers), timings[name]
        times = time_fields(Timing(t.us / count, t.us_p10 / count, t.us_p90 / count, t.n), 3)
        times["samples"] = times.pop("n")
        case: dict[str, Any] = {"model": MODEL, "layers": count, "m": len(inputs.positions), "provider": name}
        found.append(DecodeRecord("decode", **case, error=round(errors[name], 5), **times, **run))
    return found


def line(records: Sequence[DecodeRecord]) -> str:
    """One number of tokens as a line of text."""
    times = "  ".join(f"{r.provider} {r.us:.2f}" for r in records)
    return f"{records[0].model} m={records[0].m}, us a layer: {times}"
