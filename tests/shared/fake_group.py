"""A process group of which this process is one rank and whose other ranks do not exist: graphs with collectives can be
traced and rewritten in it, and mean nothing when they run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from normquant.distributed import close_workspace, open_workspace
from normquant.distributed.workspace import workspaces


@contextmanager
def fake_group(ranks: int = 2, **known: Any) -> Iterator[dist.ProcessGroup]:
    """The group of all ranks, with a workspace. known: what else that knows, such as the capability of the GPUs."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    group = dist.group.WORLD
    assert group is not None
    open_workspace(group, 256)
    workspaces[group.group_name] = replace(workspaces[group.group_name], **known)
    try:
        yield group
    finally:
        close_workspace(group)
        dist.destroy_process_group()
