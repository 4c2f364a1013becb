"""Questions about the data flow of a program that several rules ask."""

from dataclasses import dataclass, field
from functools import cached_property

from normquant.audit.program import Edge, Extern, Kernel, Launch, Program
from normquant.audit.source import operators

_WINDOW = 256  # launches further apart than this are no neighbours; keeps the ancestry of long programs small
_FUSIBLE = frozenset({"pointwise", "reduction", "persistent_reduction", "foreach"})


@dataclass(frozen=True)
class Flow:
    """The edges of a program, by both ends, and which launches depend on which."""

    program: Program
    edges: tuple[Edge, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "edges", self.program.edges)

    @cached_property
    def into(self) -> dict[int, list[Edge]]:
        found: dict[int, list[Edge]] = {}
        for edge in self.edges:
            found.setdefault(edge.consumer, []).append(edge)
        return found

    @cached_property
    def out_of(self) -> dict[int, list[Edge]]:
        found: dict[int, list[Edge]] = {}
        for edge in self.edges:
            if edge.producer is not None:
                found.setdefault(edge.producer, []).append(edge)
        return found

    @cached_property
    def readers(self) -> dict[tuple[str, int | None], list[Edge]]:
        """(storage, its writer) -> the edges that read it."""
        found: dict[tuple[str, int | None], list[Edge]] = {}
        for edge in self.edges:
            found.setdefault((self.program.storage(edge.buffer), edge.producer), []).append(edge)
        return found

    @cached_property
    def _ancestors(self) -> list[int]:
        """For each launch, a bit per launch before it that it depends on: bit k is the one k + 1 positions before."""
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
        """Whether another launch has to run between the two, they never both run, or are too far apart to tell."""
        launches = self.program.launches
        if later - earlier > _WINDOW or launches[earlier].branch != launches[later].branch:
            return True
        return any(self.depends(later, k) and self.depends(k, earlier) for k in range(earlier + 1, later))

    def could_join(self, launch: Launch) -> bool:
        """Whether a launch only moves bytes row by row, so that it could be one with its neighbour."""
        if isinstance(launch, Kernel):
            return launch.kind in _FUSIBLE
        return isinstance(launch, Extern) and operators.is_row_wise(launch.name)

    def sole_reader(self, edge: Edge) -> bool:
        """Whether nobody else needs what the edge carries."""
        held = self.readers[(self.program.storage(edge.buffer), edge.producer)]
        return all(other.consumer == edge.consumer for other in held) and not self.program.is_output(edge.buffer)

    def written(self, edge: Edge) -> int:
        """The bytes that the edge's producer wrote for it."""
        if edge.producer is None:
            return 0
        storage = self.program.storage(edge.buffer)
        writes = self.program.launches[edge.producer].writes
        return sum(access.bytes for access in writes if self.program.storage(access.buffer) == storage)
