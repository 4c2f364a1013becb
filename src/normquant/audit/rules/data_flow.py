"""The data flow of a program, as several rules need it."""

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from normquant.audit import operators
from normquant.audit.program import Edge, Extern, Kernel, Program, ProgramLaunch

_WINDOW = 256  # launches further apart than this are not neighbours; bounds the ancestor masks of long programs
_FUSIBLE = frozenset({"pointwise", "reduction", "persistent_reduction", "foreach"})

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Flow:
    """The edges of a program by both ends, and which launches depend on which."""

    program: Program

    @property
    def edges(self) -> tuple[Edge, ...]:
        return self.program.edges

    @cached_property
    def into(self) -> dict[int, list[Edge]]:
        """A launch -> the edges to it."""
        return _grouped(self.edges, lambda edge: edge.consumer)

    @cached_property
    def out_of(self) -> dict[int | None, list[Edge]]:
        """A launch -> the edges from it; None -> those from the program's inputs."""
        return _grouped(self.edges, lambda edge: edge.producer)

    @cached_property
    def readers(self) -> dict[tuple[str, int | None], list[Edge]]:
        """(storage, its writer) -> the edges that read it."""
        return _grouped(self.edges, lambda edge: (self.program.storage(edge.buffer), edge.producer))

    @cached_property
    def _ancestors(self) -> list[int]:
        """Per launch, a mask of the launches it depends on: bit k is the launch k + 1 positions before."""
        masks: list[int] = []
        limit = (1 << _WINDOW) - 1
        for position in range(len(self.program.launches)):
            mask = 0
            for edge in self.into.get(position, ()):
                back = position - edge.producer if edge.producer is not None else 0
                if 0 < back <= _WINDOW and edge.producer is not None:
                    mask |= (1 << (back - 1)) | (masks[edge.producer] << back)
            masks.append(mask & limit)
        return masks

    def depends(self, later: int, earlier: int) -> bool:
        back = later - earlier
        return 0 < back <= _WINDOW and bool(self._ancestors[later] >> (back - 1) & 1)

    def separated(self, earlier: int, later: int) -> bool:
        """Whether another launch must run between the two, they never both run, or they are too far apart to tell."""
        launches = self.program.launches
        if later - earlier > _WINDOW or launches[earlier].branch != launches[later].branch:
            return True
        return any(self.depends(later, k) and self.depends(k, earlier) for k in range(earlier + 1, later))

    def is_fusible(self, launch: ProgramLaunch) -> bool:
        """Whether a launch works row by row, so that it could be fused with its neighbour."""
        if isinstance(launch, Kernel):
            return launch.kind in _FUSIBLE
        return isinstance(launch, Extern) and operators.is_row_wise(launch.name)

    def sole_reader(self, edge: Edge) -> bool:
        """Whether nothing else needs what the edge carries."""
        held = self.readers[(self.program.storage(edge.buffer), edge.producer)]
        return all(other.consumer == edge.consumer for other in held) and not self.program.is_output(edge.buffer)

    def written(self, edge: Edge) -> int:
        """The bytes that the edge's producer wrote to its buffer."""
        if edge.producer is None:
            return 0
        storage = self.program.storage(edge.buffer)
        writes = self.program.launches[edge.producer].writes
        return sum(access.bytes for access in writes if self.program.storage(access.buffer) == storage)


def _grouped(edges: Iterable[Edge], key: Callable[[Edge], Key]) -> dict[Key, list[Edge]]:
    found: dict[Key, list[Edge]] = {}
    for edge in edges:
        found.setdefault(key(edge), []).append(edge)
    return found
