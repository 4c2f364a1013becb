"""What every compiled provider needs: one compile for any number of rows, and no fallback to eager."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch


def any_rows(tensors: Iterable[torch.Tensor | None], dim: int = 0) -> None:
    """Make the next compile accept any number of rows above one along `dim`; a single row has its own compile."""
    for t in tensors:
        if t is not None and t.shape[dim] > 1:
            torch._dynamo.mark_dynamic(t, dim)


@contextlib.contextmanager
def no_recompile_limit() -> Iterator[None]:
    """Every layer, width and M has its own compile; beyond Dynamo's limit of eight it would silently run eager."""
    with torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=4096):
        yield
