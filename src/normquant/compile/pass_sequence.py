"""Several passes in the place of one: not every torch that is supported takes a list of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch._inductor.custom_graph_pass import CustomGraphPass, CustomInferenceAwareGraphPass
from torch.fx import Graph


@dataclass(frozen=True)
class PassSequence(CustomInferenceAwareGraphPass):
    """Runs each pass in order. Equal to a sequence of equal passes."""

    passes: tuple[Callable[..., None], ...]

    def __call__(self, graph: Graph, is_inference: bool) -> None:  # type: ignore[override]  # torch's own signature
        for one in self.passes:
            if isinstance(one, CustomInferenceAwareGraphPass):
                one(graph, is_inference)
            else:
                one(graph)

    def uuid(self) -> Any:
        """None, which keeps compiled graphs out of the caches, where one of the passes has no uuid."""
        keys = tuple(one.uuid() if isinstance(one, CustomGraphPass) else None for one in self.passes)
        return None if None in keys else keys
