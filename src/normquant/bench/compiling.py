"""What every provider that is compiled needs: one compile for any number of rows, and none that falls back to eager."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch


def any_rows(tensors: Iterable[torch.Tensor | None], dim: int = 0) -> None:
    """Have the next compile take any number of rows, above one, along `dim`; a single row has a compile of its own."""
    for t in tensors:
        if t is not None and t.shape[dim] > 1:
            torch._dynamo.mark_dynamic(t, dim)


@contextlib.contextmanager
def no_recompile_limit() -> Iterator[None]:
    """Dynamo keeps a compile for every layer, width and M; its limit of eight would silently fall back to eager."""
    with torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=4096):
        yield
