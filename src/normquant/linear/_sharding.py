"""How the block-FP8 product runs on DTensors: shards of rows, of N or of K, wherever every rank has whole blocks."""

from __future__ import annotations

from typing import Any

from normquant.linear.weights import BLOCK


def rules(data: Any, scale: Any, weight: Any, weight_scale: Any, out_dtype: Any) -> list[tuple[list[Any], list[Any]]]:
    """What `torch.ops.normquant.block_fp8_linear` accepts: placements of the output, and of the arguments.

    Rows: as many of scale as of data. N: rows of the weight and of its scales; the output's columns. K: columns of all
    four, where data or weight has them already: each rank's product is a part of the sum, rounded to out_dtype before
    it is added, which is not to happen to anybody who did not ask for it.
    """
    from torch.distributed.tensor import Partial, Replicate, Shard

    every, ranks = Replicate(), weight.mesh.size()
    accepted: list[tuple[list[Any], list[Any]]] = [
        ([every], [every, every, every, every, None]),
        ([Shard(0)], [Shard(0), Shard(0), every, every, None]),
    ]
    n, k = weight.shape
    if n % (BLOCK * ranks) == 0:
        accepted.append(([Shard(1)], [every, every, Shard(0), Shard(0), None]))
    by_k = any(placement.is_shard(1) for given in (data, weight) for placement in given.placements)
    if by_k and k % (BLOCK * ranks) == 0:
        accepted.append(([Partial()], [Shard(1), Shard(1), Shard(1), Shard(1), None]))
    return accepted
