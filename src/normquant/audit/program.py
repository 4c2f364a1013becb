"""A generated program, wherever it was read from: launches in order, buffers, bytes and edges.

Sizes are numbers here: code with symbolic sizes gives one `Program` per set of sizes, and `Buffer.shape` keeps the
symbolic text. Bytes are DRAM bytes in the best case of every kernel: each element that a kernel touches is counted
once, however often it is loaded; `Access.loads` says how often.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

DTYPE_BYTES: dict[str, int] = {
    "float64": 8, "int64": 8, "uint64": 8, "complex64": 8, "complex128": 16,
    "float32": 4, "int32": 4, "uint32": 4, "complex32": 4,
    "bfloat16": 2, "float16": 2, "int16": 2, "uint16": 2,
    "int8": 1, "uint8": 1, "bool": 1,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1,
    "float4_e2m1fn_x2": 1,
}  # fmt: skip

COPY_SAME = "same"  # every element is stored where it was loaded
COPY_LAYOUT = "layout"  # the same elements, in other places


@dataclass(frozen=True)
class Buffer:
    """A tensor that the program reads or writes. Buffers that share memory have the same `storage`."""

    name: str
    dtype: str
    shape: tuple[str, ...]
    stride: tuple[str, ...]
    bytes: int
    role: str  # input, constant, intermediate or output
    storage: str = ""


@dataclass(frozen=True)
class Access:
    """One launch's use of one buffer: distinct bytes touched, and in how many passes they are loaded or stored."""

    buffer: str
    bytes: int
    loads: int = 1


@dataclass(frozen=True)
class Copy:
    """Data that a kernel only moves: from, to, `COPY_SAME` or `COPY_LAYOUT`, and the dtypes on the way."""

    source: str
    destination: str
    kind: str
    dtypes: tuple[str, ...]  # as loaded, every cast, as stored


@dataclass(frozen=True)
class Origin:
    """A line of the user's program that a launch comes from."""

    file: str
    line: int
    code: str = ""


@dataclass(frozen=True)
class ProgramLaunch:
    """One call that the generated program makes: of a generated kernel, or of something else."""

    position: int
    name: str
    reads: tuple[Access, ...]
    writes: tuple[Access, ...]
    file: str = ""
    line: int = 0
    code: str = ""  # that line of the generated code
    origins: tuple[Origin, ...] = ()
    aten: tuple[str, ...] = ()  # the graph operations that it was made of
    mutates: tuple[str, ...] = ()  # buffers that held data and are overwritten
    branch: str = ""  # which side of which branch it is on: launches on different sides do not both run

    @property
    def bytes_read(self) -> int:
        return sum(access.bytes for access in self.reads)

    @property
    def bytes_written(self) -> int:
        return sum(access.bytes for access in self.writes)

    @property
    def bytes(self) -> int:
        return self.bytes_read + self.bytes_written


@dataclass(frozen=True)
class Kernel(ProgramLaunch):
    """A generated kernel. `kind` is Inductor's: pointwise, reduction, persistent_reduction, template, foreach, user."""

    kind: str = "pointwise"
    rows: str = ""  # the size of the outermost loop, as text: equal for kernels over the same rows
    copies: tuple[Copy, ...] = ()
    is_copy: bool = False  # it does nothing else
    why_not_fused: tuple[tuple[str, str], ...] = ()  # (name of the other launch, Inductor's reason)


@dataclass(frozen=True)
class View:
    """A tensor as it is passed to a call: sizes and strides as text, symbols included."""

    buffer: str
    shape: tuple[str, ...]
    stride: tuple[str, ...]


@dataclass(frozen=True)
class Extern(ProgramLaunch):
    """A call of something that Inductor did not generate: a library kernel or a custom operator."""

    arguments: tuple[str, ...] = ()  # as the call spells them
    views: dict[int, View] = field(default_factory=dict)  # the tensors among them, by position


@dataclass(frozen=True)
class Edge:
    """Data that one launch passes to a later one through a buffer in DRAM. `producer` is None for program inputs."""

    buffer: str
    producer: int | None
    consumer: int
    bytes: int


@dataclass(frozen=True)
class Program:
    """A generated program at one set of sizes."""

    launches: tuple[ProgramLaunch, ...]
    buffers: dict[str, Buffer]
    outputs: tuple[str, ...] = ()
    sizes: dict[str, int] = field(default_factory=dict)
    name: str = ""
    notes: tuple[str, ...] = ()  # what could not be read, and what was assumed

    @cached_property
    def kernels(self) -> tuple[Kernel, ...]:
        return tuple(launch for launch in self.launches if isinstance(launch, Kernel))

    @cached_property
    def externs(self) -> tuple[Extern, ...]:
        return tuple(launch for launch in self.launches if isinstance(launch, Extern))

    @cached_property
    def bytes(self) -> int:
        return sum(launch.bytes for launch in self.launches)

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        return tuple(self._edges())

    def storage(self, name: str) -> str:
        """The memory behind a buffer's name."""
        buffer = self.buffers.get(name)
        return (buffer.storage or name) if buffer else name

    def _edges(self) -> Iterator[Edge]:
        last_writer: dict[str, int] = {}
        for launch in self.launches:
            for access in launch.reads:
                yield Edge(access.buffer, last_writer.get(self.storage(access.buffer)), launch.position, access.bytes)
            for access in launch.writes:
                last_writer[self.storage(access.buffer)] = launch.position

    def is_output(self, name: str) -> bool:
        """Whether the program returns this memory."""
        return self.storage(name) in self._returned

    @cached_property
    def _returned(self) -> frozenset[str]:
        return frozenset(self.storage(output) for output in self.outputs)

    def role(self, name: str) -> str:
        buffer = self.buffers.get(name)
        if buffer is None:
            return "intermediate"
        held = self.buffers.get(self.storage(name), buffer)
        return "output" if self.is_output(name) and held.role == "intermediate" else held.role


@dataclass(frozen=True)
class GeneratedCode:
    """The text of one generated module, where it comes from, and after a live compile what its scheduler knew."""

    name: str
    text: str
    scheduled: Program | None = None
