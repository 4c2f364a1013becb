"""Warm up the kernels that a rewritten graph will launch, before the graph serves a request."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Graph, Node

from normquant.compile.find.graph import arguments, value
from normquant.ops._warmup import warmup
from normquant.spec import QuantSpec

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
                count += warmup(**wanted)
    return count


def kernels(graph: Graph) -> Iterator[dict[str, Any]]:
    """Arguments of `warmup` for each op of this package in the graph that chooses among kernels."""
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "normquant":
            name = node.target._schema.name.partition("::")[2]
            if name != "rope_last":  # one kernel for any number of rows: the run that sizes the cache has launched it
                yield {"op": name, **_arguments(name, node)}


def _arguments(name: str, node: Node) -> dict[str, Any]:
    args = arguments(node)
    x = value(args[0])
    common = {"spec": QuantSpec.decode(args[-1]), "dtype": x.dtype, "device": x.device}
    if name == "group_quant":
        return common | {"k": x.shape[-1]}
    if name == "silu_mul_quant":
        return common | {"k": x.shape[-1] // 2}
    if name.startswith("latent"):
        q_weight, kv_weight = (value(arg) for arg in args[1:3])
        q, c = len(q_weight), len(kv_weight)
        latent = (c, x.shape[-1] - q - c)
        return common | {"k": q, "latent": latent, "weight_dtype": q_weight.dtype, "rope": args[-2]}
    weight = value(args[2 if name.startswith("add") else 1])
    return common | {"k": x.shape[-1], "weight_dtype": weight.dtype, "weight_offset": args[-2]}
