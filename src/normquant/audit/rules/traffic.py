"""Rules about data that crosses DRAM more often than it needs to."""

import itertools
from collections.abc import Iterator, Sequence

from normquant.audit import operators
from normquant.audit.program import DTYPE_BYTES, Access, Edge, Extern, Kernel, Program, ProgramLaunch
from normquant.audit.result import Draft
from normquant.audit.rules.data_flow import Flow

_MAIN_SHARE = 0.5  # of the bytes that an operator reads: its main input, as opposed to weights and scales


def opaque_boundary(flow: Flow, programs: Sequence[Program]) -> Iterator[Draft]:
    """A row-wise result that goes through DRAM because the row-wise operator that reads it is opaque."""
    launches = flow.program.launches
    for edge in flow.edges:
        consumer = launches[edge.consumer]
        if edge.producer is None or not isinstance(consumer, Extern) or not operators.is_row_wise(consumer.name):
            continue
        producer = launches[edge.producer]
        main = edge.bytes >= _MAIN_SHARE * consumer.bytes_read
        if not main or not flow.is_fusible(producer) or flow.separated(edge.producer, edge.consumer):
            continue
        both = flow.sole_reader(edge)
        yield Draft(
            consumer,
            edge.bytes + (flow.written(edge) if both else 0),
            f"{edge.buffer} goes from {producer.name} through DRAM because {consumer.name} is opaque to the compiler"
            + ("" if both else f"; others need {edge.buffer} too, so only this read goes away"),
            f"one kernel that does the work of both, such as a fused form of {consumer.name}",
            edge.buffer,
            1,
        )


def unfused_neighbours(flow: Flow, programs: Sequence[Program]) -> Iterator[Draft]:
    """Two generated kernels over the same rows, with nothing that must run between them."""
    seen: set[tuple[int, int]] = set()
    for edge in flow.edges:
        pair = _pair(flow, edge)
        if pair is None or (edge.producer, edge.consumer) in seen or edge.producer is None:
            continue
        seen.add((edge.producer, edge.consumer))
        shared = [e for e in flow.into[edge.consumer] if e.producer == edge.producer]
        size = sum(e.bytes + (flow.written(e) if flow.sole_reader(e) else 0) for e in shared)
        names = ", ".join(dict.fromkeys(e.buffer for e in shared))
        yield _unfused(pair, size, f"{names} goes from {pair[0].name} to {pair[1].name} through DRAM")
    for first, second in zip(flow.program.launches, flow.program.launches[1:], strict=False):
        if _same_rows(flow, first, second) and not flow.depends(second.position, first.position):
            common = {a.buffer for a in first.reads} & {a.buffer for a in second.reads}
            if common and isinstance(first, Kernel) and isinstance(second, Kernel):
                names = ", ".join(sorted(common))
                yield _unfused(
                    (first, second), 0, f"{first.name} and {second.name} both read {names}, in a launch each"
                )


def _pair(flow: Flow, edge: Edge) -> tuple[Kernel, Kernel] | None:
    if edge.producer is None:
        return None
    first, second = flow.program.launches[edge.producer], flow.program.launches[edge.consumer]
    if not _same_rows(flow, first, second) or flow.separated(first.position, second.position):
        return None
    return (first, second) if isinstance(first, Kernel) and isinstance(second, Kernel) else None


def _same_rows(flow: Flow, first: ProgramLaunch, second: ProgramLaunch) -> bool:
    if not isinstance(first, Kernel) or not isinstance(second, Kernel):
        return False
    if first.branch != second.branch or _is_split_reduction(first, second):
        return False
    return bool(first.rows) and first.rows == second.rows and flow.is_fusible(first) and flow.is_fusible(second)


def _is_split_reduction(first: Kernel, second: Kernel) -> bool:
    """Whether these are two stages of one reduction, where the second needs all of the first."""
    return bool(first.aten) and first.aten == second.aten and "reduction" in first.kind and "reduction" in second.kind


def _unfused(pair: tuple[Kernel, Kernel], size: int, what: str) -> Draft:
    first, second = pair
    reason = next((why for other, why in second.why_not_fused if other == first.name), "")
    return Draft(
        second,
        size,
        what + (f"; Inductor did not fuse them: {reason}" if reason else ""),
        "bring both into one shape of loop (the same view of the rows), or write one kernel for both",
        "",
        1,
    )


def reread(flow: Flow, programs: Sequence[Program]) -> Iterator[Draft]:
    """A kernel that loads data in several passes, or two neighbours over the same rows that load the same data."""
    for kernel in flow.program.kernels:
        for access in kernel.reads:
            if access.loads > 1 and access.bytes >= _MAIN_SHARE * max(a.bytes for a in kernel.reads):
                yield Draft(
                    kernel,
                    access.bytes * (access.loads - 1),
                    f"loads {access.buffer} in {access.loads} passes; later ones hit the cache only while a row fits",
                    "a kernel that keeps the row in registers (a persistent reduction) loads it once",
                    access.buffer,
                )
    for held in flow.readers.values():
        for first, second in itertools.pairwise(held):
            yield from _read_by_both(flow, first, second)


def _read_by_both(flow: Flow, first: Edge, second: Edge) -> Iterator[Draft]:
    a, b = flow.program.launches[first.consumer], flow.program.launches[second.consumer]
    buffer = flow.program.buffers.get(first.buffer)
    if a is b or buffer is None or not (isinstance(a, Kernel) or isinstance(b, Kernel)):
        return
    joinable = flow.is_fusible(a) and flow.is_fusible(b) and not flow.separated(a.position, b.position)
    if not joinable or (isinstance(a, Kernel) and isinstance(b, Kernel) and a.rows != b.rows):
        return
    overlap = min(first.bytes + second.bytes - buffer.bytes, first.bytes, second.bytes)
    if overlap > 0 and overlap >= _MAIN_SHARE * max(access.bytes for access in b.reads):
        yield Draft(
            b,
            overlap,
            f"loads {first.buffer} again, which {a.name} has just loaded over the same rows",
            "one kernel for both loads it once",
            first.buffer,
        )


def fp32_spill(flow: Flow, programs: Sequence[Program]) -> Iterator[Draft]:
    """An fp32 intermediate between a kernel that reads 16-bit data and kernels that write 16-bit data."""
    for kernel in flow.program.kernels:
        for access in kernel.writes:
            edges = flow.readers.get((flow.program.storage(access.buffer), kernel.position), [])
            if not edges or flow.program.role(access.buffer) != "intermediate" or not _is_wide(flow, access):
                continue
            count = access.bytes // 4
            narrow_in = max((_count(flow, a) for a in kernel.reads if _width(flow, a) <= 2), default=0)
            consumers = [flow.program.launches[edge.consumer] for edge in edges]
            is_the_data = narrow_in >= count >= _MAIN_SHARE * narrow_in > 0
            if is_the_data and all(_writes_narrow(flow, consumer, count) for consumer in consumers):
                yield Draft(
                    kernel,
                    (access.bytes + sum(edge.bytes for edge in edges)) // 2,
                    f"{access.buffer} goes through DRAM as float32 between {kernel.name} and "
                    f"{', '.join(dict.fromkeys(c.name for c in consumers))}, which work on 16-bit data",
                    "convert to the activation dtype before the buffer is written, or keep both in one kernel",
                    access.buffer,
                )


def _is_wide(flow: Flow, access: Access) -> bool:
    buffer = flow.program.buffers.get(access.buffer)
    return buffer is not None and buffer.dtype == "float32"


def _width(flow: Flow, access: Access) -> int:
    buffer = flow.program.buffers.get(access.buffer)
    return DTYPE_BYTES.get(buffer.dtype, 8) if buffer is not None else 8


def _count(flow: Flow, access: Access) -> int:
    return access.bytes // _width(flow, access)


def _writes_narrow(flow: Flow, launch: ProgramLaunch, count: int) -> bool:
    return isinstance(launch, Kernel) and any(_width(flow, a) <= 2 and _count(flow, a) >= count for a in launch.writes)
