"""What a decision about the ops of a group may depend on: nothing that differs between its ranks."""

from __future__ import annotations

import json
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from normquant.distributed import first_call
from normquant.distributed.workspace import workspaces
from normquant.ops._gather import group_of

TABLE = Path(__file__).with_name("one_shot_rows.json")


@dataclass(frozen=True)
class GroupFacts:
    """A group whose ops can be called.

    capability: of its GPUs; None on CPUs and where they differ. no_memory: why its ranks do not reach each other's
    memory, "" where they do.
    """

    name: str
    ranks: int
    capability: tuple[int, int] | None = None
    no_memory: str = ""

    def unmeasured(self, k: int, m: int | None) -> str | None:
        """Why it is not known that the op of m rows of k values is faster than an all-reduce and the fused norm; None
        where that was measured. m None: any number of rows may come."""
        if self.no_memory:
            return f"the ranks share no memory ({self.no_memory})"
        table = measured_table()
        measured, faster = table["measured"], table["faster_than_nccl"].get(str(self.ranks))
        if self.capability is None or f"{self.capability[0]}.{self.capability[1]}" != measured["capability"]:
            return "the GPUs of the ranks are not those that were measured"
        if faster is None:
            return f"not measured on {self.ranks} ranks"
        if k not in (widths := measured["widths"][str(self.ranks)]):
            return f"measured on {self.ranks} ranks for K = {', '.join(map(str, widths))} only, and this is {k}"
        if m is None and faster < measured["rows"]:
            return f"the number of rows is not known, and above {faster} it is not faster on {self.ranks} ranks"
        if m is not None and m > faster:
            return f"not known to be faster above {faster} rows on {self.ranks} ranks"
        return None


@cache
def measured_table() -> dict[str, Any]:
    """What was measured of the ops of a group: where they are the faster, and with which algorithm."""
    table: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return table


def facts_of(name: str) -> GroupFacts:
    """The facts of a group by its name. Raises ValueError where there is no such group, or no workspace for it."""
    if (workspace := workspaces.get(name)) is not None:
        return GroupFacts(name, workspace.group.size(), workspace.capability, workspace.reason)
    try:
        group = group_of(name)
    except (RuntimeError, ValueError, LookupError) as error:
        raise ValueError(f"there is no process group {name!r} here: {str(error).splitlines()[0]}") from None
    if first_call.rows_of_new() is None:
        raise ValueError(
            f"group {name!r} has no workspace; call normquant.distributed.open_workspace on every rank before the "
            f"first compile"
        )
    return GroupFacts(name, group.size(), torch.cuda.get_device_capability() if torch.cuda.is_available() else None)


def known_groups() -> Hashable:
    """What `facts_of` depends on now, for the key of a compile cache."""
    return tuple(facts_of(name) for name in sorted(workspaces)), first_call.rows_of_new()
