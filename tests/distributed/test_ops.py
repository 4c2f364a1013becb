"""The ops of a group on CPUs, four processes over gloo, against the reference in one."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from itertools import product

import pytest
import torch
import torch.distributed as dist
from shared.compare import assert_bitwise
from shared.inputs import activations, awkward, weights
from shared.ranks import free_port, run_ranks

from normquant import QuantSpec, reference
from normquant.distributed import MissingRank, check_agreement, open_workspace
from normquant.ops.all_reduce_add_rms_norm_quant import op_name, own_rows

K, EPS = 512, 1e-6
SPECS = (
    QuantSpec(),
    QuantSpec(layout="col_tma", sum="rounded", rounding="twice"),
    QuantSpec(scale="ue8m0_packed", layout="col_tma"),
)
OUTPUTS = ((True, False), (True, True), (False, True))


def join(rank: int, world: int, port: int, timeout_s: float = 30.0) -> dist.ProcessGroup:
    dist.init_process_group(
        "gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world, timeout=timedelta(seconds=30)
    )
    open_workspace(dist.group.WORLD, K, timeout_s=timeout_s)
    return dist.group.WORLD


def call(rank, parts, residual, spec, outputs, sharded, group):
    op = getattr(torch.ops.normquant, op_name(residual is not None, *outputs))
    tensors = (parts[rank], residual, weights(K))
    return op(*(t for t in tensors if t is not None), EPS, 0.0, sharded, group.group_name, spec.encode())


def every_op(rank: int, world: int, port: int) -> None:
    group = join(rank, world, port)
    for m, spec, outputs, add, sharded in product((1, 7), SPECS, OUTPUTS, (True, False), (True, False)):
        parts = torch.stack([awkward(m, K, seed=r) if r == 1 else activations(m, K, seed=r) for r in range(world)])
        residual = activations(m, K, seed=99) if add else None
        data, scale, total, norm = reference.all_reduce_add_rms_norm_quant(parts, residual, weights(K), EPS, spec)
        got = list(call(rank, parts, residual, spec, outputs, sharded, group))
        at = 2 * outputs[0]
        if sharded:
            own = own_rows(m, rank, world)
            got[at], total = got[at][own], total[own]
        assert_bitwise(got, [*[data, scale] * outputs[0], total, *[norm] * outputs[1]])


def test_every_op_gives_the_bits_of_the_reference_on_every_rank() -> None:
    run_ranks(every_op, 4, free_port())


def a_rank_is_silent(rank: int, world: int, port: int, dies: bool) -> str:
    group = join(rank, world, port, timeout_s=3.0)
    if rank == 1:
        if dies:
            os._exit(0)
        time.sleep(8)
        return ""
    with pytest.raises(MissingRank) as caught:
        parts = torch.stack([activations(2, K, seed=r) for r in range(world)])
        call(rank, parts, None, SPECS[0], (True, False), False, group)
    return str(caught.value)


def test_a_rank_that_hangs_is_named_by_all_others() -> None:
    first, _, *others = run_ranks(a_rank_is_silent, 3, free_port(), False)
    for text in (first, *others):
        assert "rank 1 has not sent" in text and "3 s" in text and "all_reduce_add_rms_norm_quant" in text


def a_weight_differs(rank: int, world: int, port: int) -> str:
    group = join(rank, world, port)
    weight = weights(K)
    check_agreement(group, activations(2, K), [weight], eps=EPS)
    if rank == 2:
        weight[3] += 1
    with pytest.raises(ValueError) as caught:
        check_agreement(group, activations(2, K), [weight], eps=EPS)
    return str(caught.value)


def test_a_weight_that_differs_is_an_error_that_names_the_rank() -> None:
    for text in run_ranks(a_weight_differs, 3, free_port()):
        assert "rank 2" in text and "weight 0" in text
