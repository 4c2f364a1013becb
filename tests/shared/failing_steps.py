"""Make one step of the compile pass raise: the making of a node, or a change to a node that is there."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from shared import pass_harness
from torch.fx import Graph, GraphModule, Node

from normquant.compile import FusionReport, driver
from normquant.compile.edit.build import Builder, Rewrite
from normquant.compile.policy import Rules

COMMIT = Rewrite.commit
# Not Graph.erase_node: that is how the pass takes a failed rewrite back.
STEPS: tuple[tuple[Any, str], ...] = (
    (Builder, "__call__"),
    (Rewrite, "commit"),
    (Node, "replace_all_uses_with"),
    (Node, "replace_input_with"),
    (Graph, "eliminate_dead_code"),
    (driver, "clean"),
    (driver, "keep_outputs_apart"),
)


class PlantedError(RuntimeError):
    pass


@dataclass
class Steps:
    """The steps that a pass takes, by name. The one numbered `fail_at` raises, before it is done or `after`; a commit
    before, since nothing that could raise comes after one."""

    fail_at: int | None = None
    after: bool = False
    taken: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return self.fail_at is not None and len(self.taken) > self.fail_at

    @contextmanager
    def watched(self) -> Iterator[None]:
        with ExitStack() as patches:
            for owner, name in STEPS:
                patches.enter_context(mock.patch.object(owner, name, self._watching(getattr(owner, name))))
            yield

    def _watching(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            number = len(self.taken)
            self.taken.append(step.__qualname__)
            if number != self.fail_at:
                return step(*args, **kwargs)
            if self.after and step is not COMMIT:
                step(*args, **kwargs)
            raise PlantedError(f"step {number}, {step.__qualname__}")

        return call


@contextmanager
def one_step_fails(choice: random.Random) -> Iterator[list[Steps]]:
    """Let a random step fail in each pass of `run_with_pass`; gives the steps of each, the passes being not strict."""
    run, passes = pass_harness.run, []

    def failing(graph: Graph, rules: Rules, strict: bool) -> FusionReport:
        dry = Steps()
        with dry.watched():
            run(GraphModule(graph.owning_module, copy.deepcopy(graph)).graph, rules, strict=True)
        steps = Steps(choice.randrange(len(dry.taken)) if dry.taken else None, after=choice.random() < 0.5)
        passes.append(steps)
        with steps.watched():
            return run(graph, rules, strict=False)

    with mock.patch.object(pass_harness, "run", failing):
        yield passes
