"""Who runs the ops of a group, and what comes before a call; both are registered by `normquant.distributed`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from normquant.ops._op import Launcher


class Runner(Protocol):
    """What runs the ops of a group on its GPUs."""

    def __call__(self, op: str, with_residual: bool, quantized: bool, normed: bool, *args: Any) -> Any:
        """The op's outputs for its arguments, the residual among them where there is one."""

    def launcher(self, with_residual: bool, quantized: bool, normed: bool, *args: Any) -> Launcher:
        """What runs such an op on the tensors of arguments like these; x may be `PartialRows`."""

    def cached(self, name: str, make: Callable[..., Launcher]) -> Callable[..., Any]:
        """As `normquant.ops._op.cached`, as long as the workspace of the group is open."""


runners: dict[str, Runner] = {}  # by the name of the group
before_call: dict[str, Callable[..., None]] = {}  # called with an op's name and arguments; by the name of the group
at_first_call: Callable[[str, torch.Tensor], None] | None = None  # called with a group that has no runner, and x


def runner(group_name: str) -> Runner:
    """The runner of a group; raises ValueError where nobody has opened a workspace for it."""
    found = runners.get(group_name)
    if found is None:
        raise ValueError(
            f"group {group_name!r} has no workspace on this rank; call normquant.distributed.open_workspace on every "
            f"rank before the first call"
        )
    return found


def is_prepared(group_name: str) -> bool:
    """Whether nothing has to be done before a call on the ranks of a group."""
    return group_name in runners and group_name not in before_call


def prepare(op: str, *args: Any) -> None:
    """What has to be done before a call on the ranks of its group, all of which come here."""
    group_name = args[-2]
    if at_first_call is not None and group_name not in runners:
        at_first_call(group_name, args[0])
    if (hook := before_call.get(group_name)) is not None:
        hook(op, *args)
