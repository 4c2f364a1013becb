"""Warm up the kernels that a rewritten graph will launch, before the graph serves a request."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Graph

from normquant.compile.find.graph import arguments, is_tensor, value
from normquant.linear import PAIRS
from normquant.linear.pair_warmup import warm_pair
from normquant.ops import OPS, warmup

_warm: set[tuple] = set()


def warm_graph(graph: Graph) -> int:
    """Launch every kernel that the graph's ops may choose on this GPU, once a process; how many that were.

    0 where there is no GPU: a graph compiled for one that is not there has nothing to launch on.
    """
    if not torch.cuda.is_available():
        return 0
    count = 0
    for wanted in kernels(graph):
        key = tuple(sorted(wanted.items(), key=str))
        if key not in _warm:
            _warm.add(key)
            with unset_fake_temporarily():
                count += warm_pair(**wanted) if "product" in wanted else warmup(**wanted)
    return count


def kernels(graph: Graph) -> Iterator[dict[str, Any]]:
    """Arguments of `warmup` for each op of this package in the graph that chooses among kernels; with a product beside
    them those of `warm_pair`."""
    pairs = {pair.name: pair for pair in PAIRS.values()}
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "normquant":
            name = node.target._schema.name.partition("::")[2]
            args = [value(arg) if is_tensor(arg) else arg for arg in arguments(node)]
            if name in pairs:
                settings, product = pairs[name].warmup_settings(*args)
                yield settings | {"product": product}
                if OPS[settings["op"]].configs:  # for more rows
                    yield settings
            elif name in OPS and OPS[name].configs:  # else one kernel for any number of rows, which has been launched
                yield OPS[name].warmup_settings(*args)
