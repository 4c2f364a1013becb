"""`normquant bench kernels`: every provider on every case, its output checked beside its time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict

import torch

from normquant.bench import ceilings
from normquant.bench.cases import Case, inputs
from normquant.bench.providers import Provider, Run, calls
from normquant.bench.records import KernelRecord, current_run, timing_fields
from normquant.bench.timing import Call, Timing, sets_of, time_calls
from normquant.version import VERSION

COPIES = ("torch copy_", "triton copy")


def measure(case: Case, providers: Sequence[Provider], samples: int, in_l2: bool = False) -> Iterator[KernelRecord]:
    """Records of all providers that do this case, of two copies of as many bytes, and of an empty kernel.

    in_l2: inputs stay in the L2, as those do that the kernel before has just written; else they come from DRAM.
    """
    runs = {p: run for p in providers if (run := p.build(case)) is not None}
    matches = {p.name: check(case, p, run) for p, run in runs.items()}
    sets = sets_of(case, in_l2)
    data = inputs(case, sets)
    work: dict[str, Sequence[Call]] = {p.name: calls(run, data) for p, run in runs.items()}
    work |= {
        "torch copy_": ceilings.torch_copy(case.bytes, sets),
        "triton copy": ceilings.triton_copy(case.bytes, sets),
    }
    work["empty kernel"] = ceilings.empty()
    timings = time_calls(work, samples)
    copy_us = min(timings[name].us for name in COPIES)
    for name, timing in timings.items():
        yield record(case, name, timing, copy_us, matches.get(name, "not an op"), "l2" if in_l2 else "dram")


def record(case: Case, provider: str, timing: Timing, copy_us: float, match: str, inputs_in: str) -> KernelRecord:
    """One record; `copy_us` is the better copy's time for as many bytes."""
    nothing = provider == "empty kernel"
    return KernelRecord(
        suite="kernels",
        op=case.op,
        m=case.m,
        k=case.k,
        group=case.spec.group,
        layout=case.spec.layout,
        scale=case.spec.scale,
        residual=case.residual,
        normed=case.normed,
        provider=provider,
        inputs=inputs_in,
        **timing_fields(timing, 0 if nothing else case.bytes),
        pct_of_copy=None if nothing else round(100 * copy_us / timing.us, 1),
        match=match,
        **asdict(current_run(VERSION)),
    )


def check(case: Case, provider: Provider, run: Run) -> str:
    """How the provider's data compares with the reference of the rule that it claims, on this GPU."""
    if provider.spec is None:
        return "not checked: the compiler rounds as it likes"
    spec = provider.spec(case).replace(layout="row")
    sample = inputs(case, 1, seed=1)[0]
    expected = case.definition.reference(*sample.values(), spec)[0]
    data = run(sample)[0]
    differ = int((data.view(torch.uint8) != expected.view(torch.uint8)).sum())
    return "bitwise" if differ == 0 else f"{differ} of {data.numel()} values differ"
