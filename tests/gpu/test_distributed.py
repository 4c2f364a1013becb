"""The ops of a group on several GPUs, a process each: every bit, late ranks, replayed graphs, and a rank that dies.

NORMQUANT_TEST_RANKS=2,4 says on how many GPUs, else on two and on all.
"""

from __future__ import annotations

import os
import random
import time
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from shared.compare import assert_bitwise
from shared.inputs import activations, awkward, weights
from shared.linear_weights import weight_of
from shared.ranks import free_port, run_ranks

from normquant import QuantSpec, group_quant, inductor_options, quantize_weight, reference
from normquant.bench.ranks import join
from normquant.compile import last_report
from normquant.distributed import (
    MissingRank,
    checking_agreement,
    close_workspace,
    explained,
    open_workspace,
    workspaces,
)
from normquant.distributed.algorithms import COLLECTIVE, ONE_SHOT, PIECES, TWO_SHOT, Choice, GroupRunner, launch_config
from normquant.kernels.configs import Config
from normquant.linear import GROUP_PAIRS
from normquant.linear.split_product import launch_product
from normquant.ops._group_calls import runners
from normquant.ops.all_reduce_add_rms_norm_quant import op_name, own_rows

EPS, K = 1e-6, 7168
SPEC = QuantSpec(layout="col_tma")
SPECS = (
    SPEC,
    QuantSpec(layout="col_tma", scale="ue8m0", sum="rounded", rounding="twice"),
    QuantSpec(scale="ue8m0_packed", layout="col_tma"),
)
ROWS = (1, 2, 3, 7, 16, 33, 64, 129, 250, 512, 1021, 2048)
CONFIGS = (launch_config(K), Config(8, split=4, cluster=True), Config(16, split=1, prefetch=True))
WORLDS = sorted({2, torch.cuda.device_count()})
if chosen := os.environ.get("NORMQUANT_TEST_RANKS"):
    WORLDS = [int(n) for n in chosen.split(",")]

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs of one host")
on_ranks = pytest.mark.parametrize("world", WORLDS)


def start(rank: int, world: int, port: int, **settings) -> dist.ProcessGroup:
    group = join(rank, world, port)
    open_workspace(group, K, rows=2048, one_shot_rows=512, **settings)
    assert workspaces[group.group_name].exchange is not None, workspaces[group.group_name].reason
    return group


def leave() -> None:
    """To the next test without NCCL's taking down, which may wait for ranks that are gone."""
    torch.cuda.synchronize()
    dist.barrier()


def data(m: int, k: int, world: int, seed: int, dtype: torch.dtype = torch.bfloat16):
    """Parts of all ranks and the residual, on this GPU, the same on every rank; some rows are awkward."""
    make = (activations, awkward)[seed % 2]
    parts = torch.stack([make(m, k, dtype, seed=seed * world + r) for r in range(world)])
    parts.view(torch.int16)[:, m // 2, 1:6] = -1  # NaN of all ones
    return parts.cuda(), activations(m, k, dtype, seed=seed + 77).cuda()


def call(group, parts, residual, weight, spec, outputs, sharded, choice: Choice | None = None):
    run = GroupRunner(workspaces[group.group_name], *([] if choice is None else [lambda *_: choice]))
    tensors = [t for t in (parts[group.rank()], residual, weight) if t is not None]
    args = (EPS, 0.0, sharded, group.group_name, spec.encode())
    name = f"{op_name(residual is not None, *outputs)}@{choice}"
    return list(run(name, residual is not None, *outputs, *tensors, *args))


def check(group, m: int, k: int, spec, outputs, add, sharded, choice, seed: int, dtype=torch.bfloat16) -> None:
    parts, residual = data(m, k, group.size(), seed, dtype)
    residual, weight = residual if add else None, weights(k).cuda()
    expected = reference.all_reduce_add_rms_norm_quant(parts, residual, weight, EPS, spec)
    *quantized, total, norm = expected
    got = call(group, parts, residual, weight, spec, outputs, sharded, choice)
    at = 2 * outputs[0]
    if sharded:
        own = own_rows(m, group.rank(), group.size())
        got[at], total = got[at][own], total[own]
    where = f"m={m} k={k} {spec} {outputs} add={add} sharded={sharded} {choice} {dtype}"
    try:
        assert_bitwise(got, [*quantized * outputs[0], total, *[norm] * outputs[1]])
    except AssertionError as error:
        raise AssertionError(f"{where}: {error}") from None


def every_shape(rank: int, world: int, port: int) -> int:
    group, seed = start(rank, world, port, timeout_s=30.0), 0
    algorithms = [(ONE_SHOT, False), (TWO_SHOT, False), (TWO_SHOT, True), (COLLECTIVE, False), (COLLECTIVE, True)]
    everywhere = list(product(ROWS, algorithms, [SPEC], [(True, False)], [True], [K], CONFIGS[:1], [torch.bfloat16]))
    outputs = [(SPEC, wanted, add) for wanted in ((True, False), (True, True), (False, True)) for add in (True, False)]
    outputs += [(SPECS[1], (True, True), True), (SPECS[2], (True, True), True), (SPECS[2], (True, False), False)]
    some = [(m, a, *o, K, CONFIGS[0], torch.bfloat16) for m in (1, 33) for a in algorithms[:3] for o in outputs]
    other = product((7, 64), algorithms[:3], [SPEC], [(True, True)], [True], [K], CONFIGS[1:], [torch.bfloat16])
    small = product((1, 9), algorithms[:3], [SPEC], [(True, True)], [True], (512, 1536), [None], [torch.float16])
    for m, (algorithm, sharded), spec, wanted, add, k, config, dtype in [*everywhere, *some, *other, *small]:
        if algorithm == ONE_SHOT and m > 512:
            continue
        choice = Choice(algorithm, config or launch_config(k))
        check(group, m, k, spec, wanted, add, sharded, choice, seed := seed + 1, dtype)
    for m, wanted, spec in product((2049, 5003, 8192), ((True, False), (True, True)), SPECS):  # than there is room for
        check(group, m, K, spec, wanted, True, False, Choice(PIECES, launch_config(K)), seed := seed + 1)
    for m in (*ROWS, 8192):  # as the op is called, with what the table chooses
        parts, residual = data(m, K, world, seed := seed + 1)
        args = (residual, weights(K).cuda(), EPS, 0.0, False, group.group_name, SPEC.encode())
        got = torch.ops.normquant.all_reduce_add_rms_norm_quant(parts[rank], *args)
        assert_bitwise(got, reference.all_reduce_add_rms_norm_quant(parts, *args[:3], SPEC)[:3])
    whole = workspaces[group.group_name].buffer
    assert whole is not None
    leave()
    assert (whole[256:] == 0xFF).all(), "what was read was not cleared"
    close_workspace(group)
    return seed


@on_ranks
def test_every_algorithm_shape_and_output_has_the_bits_of_the_reference(world: int) -> None:
    assert len(set(run_ranks(every_shape, world, free_port(), timeout=240))) == 1


def many_rows(rank: int, world: int, port: int, wanted: int) -> int:
    group, clock = start(rank, world, port, timeout_s=30.0), random.Random(0)
    generator = torch.Generator("cuda").manual_seed(0)  # the same numbers on every rank
    weight, rows = weights(K).cuda(), 0
    ways = [(ONE_SHOT, False), (TWO_SHOT, False), (TWO_SHOT, True), (PIECES, False), (COLLECTIVE, False)]
    while rows < wanted:
        algorithm, sharded = clock.choice(ways)
        m = clock.randint(1, 512 if algorithm == ONE_SHOT else 2048) + 2048 * (algorithm == PIECES)
        wide = torch.randn(world + 1, m, K, generator=generator, device="cuda") * 4.0 ** clock.randint(-6, 6)
        *parts, residual = wide.bfloat16()
        parts = torch.stack(parts)
        *expected, total, _ = reference.all_reduce_add_rms_norm_quant(parts, residual, weight, EPS, SPEC)
        choice = Choice(algorithm, CONFIGS[0])
        *got, own_total = call(group, parts, residual, weight, SPEC, (True, False), sharded, choice)
        own = own_rows(m, rank, world) if sharded else slice(m)
        assert_bitwise([*got, own_total[own]], [*expected, total[own]])
        rows += m
    leave()
    return rows


@on_ranks
def test_a_million_random_rows_have_the_bits_of_the_reference(world: int) -> None:
    assert min(run_ranks(many_rows, world, free_port(), 1_000_000, timeout=240)) >= 1_000_000


def replays(rank: int, world: int, port: int, count: int) -> int:
    group = start(rank, world, port, timeout_s=20.0)
    clock, weight = random.Random(rank), weights(K).cuda()
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    choices = [Choice(algorithm, CONFIGS[0]) for algorithm in (ONE_SHOT, TWO_SHOT)]
    cases = []
    for seed, m in enumerate((1, 5, 64, 3, 128, 33, 2)):  # an odd number: each call meets both halves
        parts, residual = data(m, K, world, 2 * seed)
        expected = reference.all_reduce_add_rms_norm_quant(parts, residual, weight, EPS, SPEC)[0].view(torch.uint8)
        cases.append((parts, residual, choices[seed % 2], seed % 4 == 1, expected))

    def once() -> None:
        for parts, residual, choice, sharded, expected in cases:
            got = call(group, parts, residual, weight, SPEC, (True, False), sharded, choice)[0]
            wrong.add_((got.view(torch.uint8) != expected).sum())

    once()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    dist.barrier()
    with torch.cuda.graph(graph):
        once()
    for n in range(count):
        if clock.random() < 0.05:
            torch.cuda._sleep(clock.randrange(400_000))  # cycles, up to 0.2 ms
        graph.replay()
        if n % 500 == 0:
            torch.cuda.synchronize()
    leave()
    return int(wrong)


@on_ranks
def test_replayed_graphs_with_random_delays_have_no_wrong_value(world: int) -> None:
    assert run_ranks(replays, world, free_port(), 10_000, timeout=240) == [0] * world


def late(rank: int, world: int, port: int) -> None:
    group = start(rank, world, port, timeout_s=10.0)
    if rank == world - 1:
        time.sleep(4)  # as one that compiles
    check(group, 3, K, SPEC, (True, False), True, False, Choice(ONE_SHOT, CONFIGS[0]), 0)
    leave()


@on_ranks
def test_a_rank_that_is_late_is_waited_for(world: int) -> None:
    run_ranks(late, world, free_port(), timeout=120)


def dies(rank: int, world: int, port: int, algorithm: str) -> str:
    os.environ["TORCH_NCCL_ENABLE_MONITORING"] = "0"
    group = start(rank, world, port, timeout_s=4.0)
    choice = Choice(algorithm, CONFIGS[0])
    for seed in range(3):
        check(group, 3, K, SPEC, (True, False), True, False, choice, seed)
    leave()
    if rank == world - 1:
        os._exit(0)
    started = time.monotonic()
    parts, residual = data(3, K, world, 5)
    with pytest.raises(RuntimeError) as caught:
        call(group, parts, residual, weights(K).cuda(), SPEC, (True, False), False, choice)
        torch.cuda.synchronize()
    error = explained(caught.value)
    assert isinstance(error, MissingRank), caught.value
    assert time.monotonic() - started < 12
    return str(error)


@on_ranks
@pytest.mark.parametrize("algorithm", [ONE_SHOT, TWO_SHOT])
def test_a_rank_that_dies_is_named_by_all_others(world: int, algorithm: str) -> None:
    texts = run_ranks(dies, world, free_port(), algorithm, timeout=120, silent=(world - 1,))
    for text in texts[:-1]:
        assert f"rank {world - 1} has not sent" in text and "call 4" in text, text


def compiled(rank: int, world: int, port: int) -> str:
    group, m = start(rank, world, port), 16
    parts, residual = data(m, K, world, seed=4)
    weight, spec = weights(K, dtype=torch.bfloat16).cuda(), SPEC.replace(sum="rounded")

    def model(x, residual):
        total = funcol.all_reduce(x, "sum", group) + residual
        q = group_quant(torch.nn.functional.rms_norm(total, (K,), weight, EPS), spec=SPEC)
        return q.data, q.scale, total

    fused = torch.compile(model, options=inductor_options(all_reduce=True), fullgraph=True)
    with torch.inference_mode():
        with checking_agreement(group):
            fused(parts[rank], residual)
        got = fused(parts[rank], residual)
    expected = reference.all_reduce_add_rms_norm_quant(parts, residual, weight, EPS, spec)
    assert_bitwise(list(got), list(expected[:3]))
    leave()
    (site,) = last_report().sites
    return str(site)


@on_ranks
def test_a_compiled_model_has_the_bits_of_the_reference_and_every_rank_decides_alike(world: int) -> None:
    first, *others = run_ranks(compiled, world, free_port(), timeout=300)
    assert "all_reduce_add_rms_norm_quant" in first and "measured: faster" in first
    assert all(other == first for other in others)


def pairs(rank: int, world: int, port: int) -> None:
    group, inner, dtype = start(rank, world, port, timeout_s=20.0), 2304, torch.bfloat16
    name, weight = group.group_name, weights(K).cuda()
    shard = [t.cuda() for t in quantize_weight(weight_of(K, inner))]
    pair = GROUP_PAIRS["all_reduce_add_rms_norm_quant"].overload
    algorithms = ((ONE_SHOT, False), (TWO_SHOT, False), (TWO_SHOT, True), (COLLECTIVE, False))
    for n, (m, (algorithm, sharded)) in enumerate(product((1, 7, 16, 64), algorithms)):
        choice = Choice(algorithm, CONFIGS[0])
        workspace = replace(workspaces[name], serial=1000 + n)  # launches are cached by it, not by the choice
        runners[name] = GroupRunner(workspace, lambda *_, choice=choice: choice)
        q = group_quant(activations(m, inner, seed=rank).cuda(), spec=SPEC)
        factors, residual = (q.data, q.scale, *shard), activations(m, K, seed=77).cuda()
        (part,) = launch_product(*factors, dtype)(*factors)
        parts = part.new_empty(world, m, K)
        dist.all_gather_into_tensor(parts.view(-1, K), part)
        expected = list(reference.all_reduce_add_rms_norm_quant(parts, residual, weight, EPS, SPEC)[:3])
        args = (*factors, dtype, "always", "", residual, weight, EPS, 0.0, sharded, name, SPEC.encode())
        own = own_rows(m, rank, world) if sharded else slice(0, m)
        got = pair(*args)
        assert_bitwise([*got[:2], got[2][own]], [*expected[:2], expected[2][own]])
        if algorithm != COLLECTIVE:
            replayed(lambda args=args: pair(*args), expected[:2])
    leave()


def replayed(call, expected: list[torch.Tensor]) -> None:
    """A graph of a call many times over, each product launched while the kernel before it still runs."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    dist.barrier()
    with torch.cuda.graph(graph):
        outputs = [call()[:2] for _ in range(20)]
    for _ in range(20):
        graph.replay()
    torch.cuda.synchronize()
    for got in outputs:
        assert_bitwise(list(got), expected)


@on_ranks
def test_a_row_parallel_product_and_its_all_reduce_have_the_bits_of_both_apart(world: int) -> None:
    run_ranks(pairs, world, free_port(), timeout=240)
