"""Several passes in the place of one: not every torch that is supported takes a list of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch._inductor import custom_graph_pass
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

# Passes that are told whether the graph is one for inference; torch 2.11 has none, and tells nobody.
AWARE: Any = getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", None)


@dataclass(frozen=True)
class PassSequence(AWARE or CustomGraphPass):  # type: ignore[misc]  # as the torch that is here has it
    """Runs each pass in order. Equal to a sequence of equal passes."""

    passes: tuple[Callable[..., None], ...]

    def __call__(self, graph: Graph, is_inference: bool = False) -> None:
        for one in self.passes:
            if AWARE is not None and isinstance(one, AWARE):
                one(graph, is_inference)
            else:
                one(graph)

    def uuid(self) -> Any:
        """None, which keeps compiled graphs out of the caches, where one of the passes has no uuid."""
        keys = tuple(one.uuid() if isinstance(one, CustomGraphPass) else None for one in self.passes)
        return None if None in keys else keys
