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
from shared.products import factors
from shared.ranks import free_port, run_ranks
from torch._subclasses.fake_tensor import FakeTensorMode

from normquant import QuantSpec, reference
from normquant.distributed import (
    MissingRank,
    all_reduce_add_rms_norm,
    all_reduce_add_rms_norm_quant,
    check_agreement,
    checking_agreement,
    open_workspace,
)
from normquant.linear import GROUP_PAIRS, dequantized_linear
from normquant.linear.split_product import split_product
from normquant.ops.all_reduce_add_rms_norm_quant import op_name, own_rows

K, EPS = 512, 1e-6
INNER = 640  # of a product: five blocks, in two parts
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


def functions(rank: int, world: int, port: int) -> None:
    group = join(rank, world, port)
    parts, residual = torch.stack([activations(6, K, seed=r) for r in range(world)]), activations(6, K, seed=99)
    data, scale, total, norm = reference.all_reduce_add_rms_norm_quant(parts, residual, weights(K), EPS, SPECS[1])
    x, lead = parts[rank].view(2, 3, K), (2, 3, -1)
    args = (x, residual.view(2, 3, K), weights(K), EPS)
    q, *others = all_reduce_add_rms_norm_quant(*args, group=group, spec=SPECS[1], return_norm=True)
    assert_bitwise([q.data, q.scale, *others], [t.view(lead) for t in (data, scale, total, norm)])
    assert len(all_reduce_add_rms_norm_quant(*args, group=group)) == 2
    *_, lone_total, lone_norm = reference.all_reduce_add_rms_norm_quant(parts, None, weights(K), EPS, QuantSpec())
    found = all_reduce_add_rms_norm(x, None, weights(K), EPS, group=group)
    assert_bitwise(found, [t.view(lead) for t in (lone_norm, lone_total)])
    with pytest.raises(ValueError, match="rows a multiple of 8 values apart"):
        gap = activations(2, K + 4)[:, :K]
        all_reduce_add_rms_norm_quant(gap, None, weights(K), group=group)
    with pytest.raises(ValueError, match="eps is 0"):
        all_reduce_add_rms_norm_quant(x, None, weights(K), 0.0, group=group)
    with pytest.raises(RuntimeError, match="all_reduce_rms_norm_quant has no gradient"):
        all_reduce_add_rms_norm_quant(x, None, weights(K).requires_grad_(), group=group)
    fakes_are_like_the_outputs(rank, group, parts, residual)


def layout(outputs) -> list[tuple]:
    return [(t.shape, t.stride(), t.dtype) for t in outputs]


def fakes_are_like_the_outputs(rank: int, group: dist.ProcessGroup, parts, residual) -> None:
    for spec, outputs, add in product(SPECS, OUTPUTS, (True, False)):
        rest = (residual if add else None, spec, outputs, False, group)
        with FakeTensorMode(allow_non_fake_inputs=True):
            fakes = layout(call(rank, parts, *rest))
        assert fakes == layout(call(rank, parts, *rest))


def test_the_functions_take_any_leading_dimensions_and_the_fakes_are_like_the_outputs() -> None:
    run_ranks(functions, 2, free_port())


def call_pair(rank, given, wanted, residual, spec, outputs, sharded, group, eps=EPS):
    tensors = (residual, weights(K))
    rest = (*(t for t in tensors if t is not None), eps, 0.0, sharded, group.group_name, spec.encode())
    pair = GROUP_PAIRS[op_name(residual is not None, *outputs)].overload
    return pair(*given[rank], torch.bfloat16, wanted, "", *rest)


def every_pair(rank: int, world: int, port: int) -> None:
    torch.set_num_threads(1)
    group = join(rank, world, port)
    cases = product(((1, "always"), (7, "always"), (7, "auto"), (65, "always")), OUTPUTS, (True, False))
    for number, ((m, wanted), outputs, add) in enumerate(cases):
        spec, sharded = SPECS[number % 3], number % 2 == 1
        given = [factors(m, K, INNER, x=activations(m, INNER, seed=r)) for r in range(world)]
        whole, split = (
            torch.stack([multiply(*factor, torch.bfloat16) for factor in given])
            for multiply in (dequantized_linear, split_product)
        )
        assert m == 1 or not torch.equal(whole, split), "nothing would show which product it is"
        parts = split if (m, wanted) in ((1, "always"), (7, "always")) else whole
        residual = activations(m, K, seed=99) if add else None
        data, scale, total, norm = reference.all_reduce_add_rms_norm_quant(parts, residual, weights(K), EPS, spec)
        args = (rank, given, wanted, residual, spec, outputs, sharded, group)
        got = list(call_pair(*args))
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert layout(call_pair(*args)) == layout(got)
        at = 2 * outputs[0]
        if sharded:
            own = own_rows(m, rank, world)
            got[at], total = got[at][own], total[own]
        assert_bitwise(got, [*[data, scale] * outputs[0], total, *[norm] * outputs[1]])
    pairs_are_checked(rank, world, group)


def pairs_are_checked(rank: int, world: int, group: dist.ProcessGroup) -> None:
    given = [factors(3, K, INNER)] * world
    rest = (activations(3, K), SPECS[0], OUTPUTS[0], False, group)
    with checking_agreement(group):
        call_pair(rank, given, "always", *rest)
        with pytest.raises(ValueError, match=r"rank 1 of group .* has eps"):
            call_pair(rank, given, "always", *rest, eps=EPS * (1 + (rank == 1)))
    with pytest.raises(ValueError, match="eps is 0"):
        call_pair(rank, given, "always", *rest, eps=0.0)
    with pytest.raises(ValueError, match="'sometimes'"):
        call_pair(rank, given, "sometimes", *rest)
    with pytest.raises(RuntimeError, match="block_fp8_linear_all_reduce_add_rms_norm_quant has no gradient"):
        call_pair(rank, given, "always", rest[0].clone().requires_grad_(), *rest[1:])


def test_every_pair_gives_what_the_product_and_the_op_give() -> None:
    run_ranks(every_pair, 2, free_port())


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
