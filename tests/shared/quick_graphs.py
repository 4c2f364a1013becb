"""Graphs as the pass sees them, traced without torch.compile: milliseconds each, for tests of what reads one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx


def graph_of(fn: Callable[..., Any], *args: torch.Tensor, decompose: bool = True) -> GraphModule:
    """fn in the aten operations that Inductor decomposes it to, with fake values; nothing is changed in place.

    decompose=False: in those that fn calls.
    """
    from torch._inductor.decomposition import select_decomp_table

    pure = torch.func.functionalize(fn, remove="mutations")
    with torch.no_grad():
        table = select_decomp_table() if decompose else None
        gm = make_fx(pure, decomposition_table=table, tracing_mode="fake")(*args)
    gm.graph.eliminate_dead_code()
    return gm
