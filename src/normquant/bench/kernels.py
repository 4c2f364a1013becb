"""`normquant bench kernels`: every provider on every case, its output checked beside its time.

Beside them stands what no kernel can beat: an empty kernel, and copies that move as many bytes as the case.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial

import torch
import triton
import triton.language as tl

from normquant.bench.cases import Case, inputs
from normquant.bench.providers import Provider, Run, calls
from normquant.bench.records import KernelRecord, current_run, timing_fields
from normquant.bench.timing import Call, Timing, sets_of, time_calls
from normquant.version import VERSION

COPIES = ("torch copy_", "triton copy")
COPIED_ROWS = 512  # of 16 bytes, that a program copies


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
        "torch copy_": torch_copy(case.bytes, sets),
        "triton copy": triton_copy(case.bytes, sets),
    }
    work["empty kernel"] = empty()
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


@triton.jit
def empty_kernel():
    pass


@triton.jit(do_not_specialize=["n"])
def copy_kernel(src_ptr, dst_ptr, n, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    # [n, 4] int32: a mask shared by four neighbours keeps the accesses 16 bytes wide
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    at = row * 4 + tl.arange(0, 4)[None, :]
    tl.store(dst_ptr + at, tl.load(src_ptr + at, mask=row < n), mask=row < n)


def empty() -> Sequence[Call]:
    """A launch of a kernel that does nothing: the floor of every time."""
    return [partial(empty_kernel[(1,)], num_warps=1)]


def torch_copy(moved: int, sets: int) -> Sequence[Call]:
    """`copy_` of moved/2 bytes, so that `moved` bytes are read and written."""
    return [partial(d.copy_, s) for s, d in _buffers(moved, sets)]


def triton_copy(moved: int, sets: int) -> Sequence[Call]:
    """The same with a Triton kernel, 16 bytes an access."""

    def call(src: torch.Tensor, dst: torch.Tensor) -> None:
        copy_kernel[(triton.cdiv(len(src), COPIED_ROWS),)](src, dst, len(src), ROWS=COPIED_ROWS, num_warps=8)

    return [partial(call, s, d) for s, d in _buffers(moved, sets)]


def _buffers(moved: int, sets: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    shape = (max(1, moved // 32), 4)  # of int32: 16 bytes a row, and half of what is moved
    make = lambda: torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device="cuda")  # noqa: E731
    return [(make(), torch.empty(shape, dtype=torch.int32, device="cuda")) for _ in range(sets)]
