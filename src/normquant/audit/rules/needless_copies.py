"""Rules about kernels that move data and compute nothing."""

from collections.abc import Iterator, Sequence

from normquant.audit.program import COPY_LAYOUT, COPY_SAME, Copy, Extern, Kernel, Program
from normquant.audit.result import Draft
from normquant.audit.rules.data_flow import Flow

# dtype -> the dtypes that represent each of its values exactly: a cast to one of them and back changes nothing
_HOLDS: dict[str, frozenset[str]] = {
    "float8_e4m3fn": frozenset({"bfloat16", "float16", "float32", "float64"}),
    "float8_e5m2": frozenset({"bfloat16", "float16", "float32", "float64"}),
    "bfloat16": frozenset({"float32", "float64"}),
    "float16": frozenset({"float32", "float64"}),
    "float32": frozenset({"float64"}),
    "bool": frozenset({"uint8", "int8", "int16", "int32", "int64", "float32", "float64"}),
    "int8": frozenset({"int16", "int32", "int64", "float32", "float64"}),
    "uint8": frozenset({"int16", "int32", "int64", "float32", "float64"}),
    "int16": frozenset({"int32", "int64", "float32", "float64"}),
    "int32": frozenset({"int64", "float64"}),
}


def identity(flow: Flow, programs: Sequence[Program]) -> Iterator[Draft]:
    """A kernel that stores every element where it loaded it, with the same dtype."""
    for kernel, copy in _needless(flow, COPY_SAME):
        if _mutator(flow, kernel, copy) is None:
            yield Draft(
                kernel,
                kernel.bytes,
                _what_is_copied(flow, copy) + _casts(copy),
                "let the consumer read the source: after your own graph pass run Inductor's no-op removal, and use a "
                "functional op where an in-place one asked for the copy",
                copy.destination,
                1,
            )


def _what_is_copied(flow: Flow, copy: Copy) -> str:
    if flow.program.storage(copy.source) == flow.program.storage(copy.destination):
        return f"loads {copy.destination} and stores it again, in place and unchanged"
    return f"copies {copy.source} to {copy.destination} unchanged"


def layout_copy(flow: Flow, programs: Sequence[Program]) -> Iterator[Draft]:
    """A kernel that stores the elements of a buffer in another order, or packed, and computes nothing."""
    for kernel, copy in _needless(flow, COPY_LAYOUT):
        yield Draft(
            kernel,
            kernel.bytes,
            f"only changes the layout of {copy.source} into {copy.destination}{_casts(copy)}",
            "write the wanted strides where the data is made, or let the consumer take any strides "
            "(torch.Tag.flexible_layout on its operator)",
            copy.destination,
            1,
        )


def cast_round_trip(flow: Flow, programs: Sequence[Program]) -> Iterator[Draft]:
    """bf16 -> fp32 -> bf16 with nothing in between, in one kernel or across two."""
    for kind in (COPY_SAME, COPY_LAYOUT):
        for kernel, copy in _needless(flow, kind):
            if _casts(copy):
                yield _round_trip(kernel, copy, kernel.bytes, 1, " -> ".join(_steps(copy.dtypes)))
    for kernel, copy in _pure_copies(flow.program):
        for edge in flow.into.get(kernel.position, ()):
            first = flow.program.launches[edge.producer] if edge.producer is not None else None
            earlier = _only_copy(first) if isinstance(first, Kernel) else None
            if earlier is None or first is None or earlier.dtypes[-1] != copy.dtypes[0]:
                continue
            if _lossless((earlier.dtypes[0], earlier.dtypes[-1], copy.dtypes[-1])):
                both = flow.sole_reader(edge)
                spent = kernel.bytes + (first.bytes if both else 0)
                dtypes = (earlier.dtypes[0], *copy.dtypes)
                yield _round_trip(kernel, copy, spent, 1 + both, f"{' -> '.join(_steps(dtypes))} with {first.name}")


def mutated_input_copy(flow: Flow, programs: Sequence[Program]) -> Iterator[Draft]:
    """A copy of a graph input, made because an opaque operator writes into it."""
    for kernel, copy in _unchanged(flow.program, COPY_SAME):
        op = _mutator(flow, kernel, copy)
        if op is not None:
            shape = ", ".join(flow.program.buffers[copy.source].shape)
            yield Draft(
                kernel,
                kernel.bytes,
                f"copies the input {copy.source} [{shape}] because {op.name} writes into it in place",
                "use a functional form of the operator, which returns a new tensor and needs no copy",
                copy.destination,
                1,
            )


def _round_trip(kernel: Kernel, copy: Copy, size: int, launches: int, steps: str) -> Draft:
    return Draft(
        kernel,
        size,
        f"converts {copy.source} {steps} and computes nothing in between",
        "drop both conversions in the model, or let Inductor's joint-graph patterns see them next to each other",
        copy.destination,
        launches,
    )


def _pure_copies(program: Program) -> Iterator[tuple[Kernel, Copy]]:
    """Kernels that do one copy and nothing else."""
    for kernel in program.kernels:
        copy = _only_copy(kernel)
        if copy is not None and kernel.bytes:
            yield kernel, copy


def _only_copy(kernel: Kernel) -> Copy | None:
    return kernel.copies[0] if kernel.is_copy and len(kernel.copies) == 1 else None


def _unchanged(program: Program, kind: str) -> Iterator[tuple[Kernel, Copy]]:
    """Pure copies that leave every value as it was."""
    for kernel, copy in _pure_copies(program):
        if copy.kind == kind and copy.dtypes[0] == copy.dtypes[-1] and _lossless(copy.dtypes):
            yield kernel, copy


def _needless(flow: Flow, kind: str) -> Iterator[tuple[Kernel, Copy]]:
    """Unchanged copies that the program's own inputs and results do not require."""
    for kernel, copy in _unchanged(flow.program, kind):
        source, destination = flow.program.role(copy.source), flow.program.role(copy.destination)
        if destination == "input":  # an update of an input, such as a KV cache
            continue
        if destination == "output" and source in ("input", "constant", "output") and not _mutator(flow, kernel, copy):
            continue  # results may share memory neither with each other nor with an input
        yield kernel, copy


def _mutator(flow: Flow, kernel: Kernel, copy: Copy) -> Extern | None:
    """The operator that writes into a copy of an input."""
    if flow.program.role(copy.source) != "input":
        return None
    storage = flow.program.storage(copy.destination)
    for edge in flow.out_of.get(kernel.position, ()):
        consumer = flow.program.launches[edge.consumer]
        if isinstance(consumer, Extern) and storage in {flow.program.storage(name) for name in consumer.mutates}:
            return consumer
    return None


def _lossless(dtypes: Sequence[str]) -> bool:
    first = dtypes[0]
    return all(dtype == first or dtype in _HOLDS.get(first, ()) for dtype in dtypes)


def _steps(dtypes: Sequence[str]) -> list[str]:
    return [dtype for index, dtype in enumerate(dtypes) if index == 0 or dtype != dtypes[index - 1]]


def _casts(copy: Copy) -> str:
    steps = _steps(copy.dtypes)
    return f", through {' -> '.join(steps)}" if len(steps) > 1 else ""
