"""The first calls of a group, where an engine has no place of its own to prepare them: the workspace is opened by the
first one, and the ranks compare what they were given until that has been done for a whole run of the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from normquant.distributed.agreement import check_agreement
from normquant.distributed.workspace import open_workspace
from normquant.ops import _group_calls
from normquant.ops._gather import group_of

_rows: int | None = None


def open_at_first_call(rows: int = 2048) -> None:
    """From now on a group without a workspace gets one, for up to `rows` rows, at the first call of one of its ops, and
    the ranks compare the arguments of each call, weights too, as long as the number of rows stays that of the first.

    Every rank calls this before the first call, which must be no part of a CUDA graph: an engine's warm-up, with a
    number of rows of its own.
    """
    global _rows
    _rows = rows
    _group_calls.at_first_call = _open


def rows_of_new() -> int | None:
    """How many rows the workspaces are for that first calls open; None where they open none."""
    return _rows


@contextmanager
def checking_agreement(group: dist.ProcessGroup) -> Iterator[None]:
    """Within, every call of the group's ops first compares its arguments with those of the other ranks, and raises
    ValueError naming one that differs: shape and dtype of x, the weight's bits, settings.

    For the first run of a model, compiled or not, on every rank at once: each call waits for all ranks, and reads its
    weight back to the host.
    """
    _group_calls.before_call[group.group_name] = _Comparison(group)
    try:
        yield
    finally:
        _group_calls.before_call.pop(group.group_name, None)


class _Comparison:
    """Compares the arguments of one call between the ranks."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __call__(self, op: str, *args: Any) -> None:
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        eps, weight_offset, sharded, _, spec = args[len(tensors) :]
        settings = {"eps": eps, "weight_offset": weight_offset, "sharded": sharded, "spec": spec}
        check_agreement(self.group, tensors[0], [tensors[-1]], op=op, **settings)


class _FirstRun(_Comparison):
    """The same until the number of rows changes, or a CUDA graph is captured: on all ranks at the same call."""

    def __init__(self, group: dist.ProcessGroup, rows: int) -> None:
        super().__init__(group)
        self.rows = rows

    def __call__(self, op: str, *args: Any) -> None:
        if args[0].shape[0] != self.rows or (args[0].is_cuda and torch.cuda.is_current_stream_capturing()):
            _group_calls.before_call.pop(self.group.group_name, None)
        else:
            super().__call__(op, *args)


def _open(group_name: str, x: torch.Tensor) -> None:
    assert _rows is not None
    group = group_of(group_name)
    check_agreement(group, x)  # before memory of that size is shared
    open_workspace(group, x.shape[1], rows=_rows)
    _group_calls.before_call[group_name] = _FirstRun(group, x.shape[0])
