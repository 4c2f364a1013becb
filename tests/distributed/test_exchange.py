"""The kernels of several ranks against each other: a process for each, in Triton's interpreter, over shared memory."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from functools import partial
from itertools import product

import pytest
import torch
import torch.distributed as dist
from shared.compare import assert_bitwise
from shared.inputs import activations, awkward, weights
from shared.products import factors
from shared.ranks import free_port, run_ranks

from normquant import QuantSpec, reference

K = 640
HALF = 1 << 20
SPECS = (
    QuantSpec(layout="col_tma"),
    QuantSpec(scale="ue8m0_packed", layout="col_tma", sum="rounded", rounding="twice"),
    QuantSpec(group=64, scale="ue8m0"),
)
ROWS = (1, 5, 2, 8, 3, 11)
SPLITS = (2, 0, 3, 8)  # partial sums that a rank has of its part; 0: the part itself


def exchange(rank: int, buffers: list[torch.Tensor]):
    from normquant.kernels.exchange_layout import Exchange

    addresses = [b.data_ptr() for b in buffers]
    table = torch.tensor([*addresses, 0, 0], dtype=torch.int64)
    return Exchange(rank, len(buffers), table, torch.zeros(2, dtype=torch.int32), HALF)


def inputs(call: int, m: int, world: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The parts of all ranks and the residual; the same in every process."""
    make = awkward if call % 2 else activations
    parts = torch.stack([make(m, K, dtype, seed=call * world + rank) for rank in range(world)])
    parts.view(torch.int16)[:, 0, 1:4] = -1  # NaN of all ones, which are not sent as they are
    return parts, activations(m, K, dtype, seed=1000 + call)


def partial_sums(part: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """[count, M, K] fp32 that add up to about `part`, most of which they cancel."""
    sums = 8 * torch.randn(count, *part.shape, generator=torch.Generator().manual_seed(seed))
    sums[-1] = part.float() - sums[:-1].sum(dim=0)
    return sums


def call_all(rank: int, world: int, buffers: list[torch.Tensor], delays: bool) -> int:
    from shared.interpreter import repaired

    group, clock = exchange(rank, buffers), random.Random(rank)
    with repaired():
        for number, (m, spec) in enumerate(product(ROWS, SPECS)):
            if delays:
                time.sleep(clock.choice((0, 0, 0.05)))
            check_call(group, number, m, spec, (torch.bfloat16, torch.float16)[number // 2 % 2])
    return ended(rank, buffers, group)


def call_with_partial_sums(rank: int, world: int, buffers: list[torch.Tensor]) -> int:
    from shared.interpreter import repaired

    group = exchange(rank, buffers)
    with repaired():
        for number, m in enumerate(ROWS * 2):
            splits = [SPLITS[(number + r) % len(SPLITS)] for r in range(world)]
            check_call(group, number, m, SPECS[number % 2], (torch.bfloat16, torch.float16)[number // 2 % 2], splits)
    return ended(rank, buffers, group)


def ended(rank: int, buffers: list[torch.Tensor], group) -> int:
    halves = buffers[rank][64:]
    assert (halves == -1).all(), "what was read was not cleared"
    return int(group.state[0])


def check_call(group, number: int, m: int, spec: QuantSpec, dtype: torch.dtype, splits: Sequence[int] = ()) -> None:
    from normquant.kernels import all_reduce_add_rms_norm_quant as kernels
    from normquant.kernels.configs import Config
    from normquant.kernels.launch import Launch
    from normquant.kernels.partial_rows import PartialRows
    from normquant.kernels.parts_plan import Outputs

    algorithm = ("one shot", "two shots", "sharded")[number % 3]
    wanted = Outputs(*((True, False), (True, True), (False, True))[number // 3 % 3])
    chunk = -(-m // group.world)
    own = slice(group.rank * chunk, (group.rank + 1) * chunk) if algorithm == "sharded" else slice(0, m)
    parts, residual = inputs(number, m, group.world, dtype)
    residual = residual if number % 4 else None
    x = memory = parts[group.rank]
    for r, count in enumerate(splits):
        if count:
            sums = partial_sums(parts[r], count, seed=number)
            parts[r] = reference.sum_of_parts(sums, dtype)
            if r == group.rank:
                x, memory = PartialRows(m, K, count, dtype, x.device), sums.flatten(0, 1)
    expected = reference.all_reduce_add_rms_norm_quant(parts, residual, weights(K), 1e-6, spec)
    args = (x, residual, weights(K), 1e-6, 0.0, spec, wanted, group, Config(4))
    if algorithm == "one shot":
        plan = kernels.plan_one_shot(*args)
    else:
        plan = kernels.plan_two_shot(*args, algorithm == "sharded")
    tensors = (memory, residual, weights(K), group.table, group.state)
    outputs = Launch(plan)(*(t for t in tensors if t is not None))
    *quantized, total, norm = expected
    outputs[2 * wanted.quantized] = outputs[2 * wanted.quantized][own]
    assert_bitwise(outputs, [*quantized * wanted.quantized, total[own], *[norm] * wanted.normed])


def made_buffers(world: int) -> list[torch.Tensor]:
    buffers = [torch.full((64 + 2 * HALF // 4,), -1, dtype=torch.int32).share_memory_() for _ in range(world)]
    for buffer in buffers:
        buffer[:64] = 0
    return buffers


@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_algorithm_gives_the_bits_of_the_reference(monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    buffers = made_buffers(world)
    epochs = run_ranks(call_all, world, buffers, world == 3, timeout=100)
    assert epochs == [len(ROWS) * len(SPECS)] * world
    assert "TRITON_INTERPRET" in os.environ


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_may_have_their_parts_as_partial_sums(monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    epochs = run_ranks(call_with_partial_sums, world, made_buffers(world), timeout=100)
    assert epochs == [2 * len(ROWS)] * world


def in_place(settings: tuple, m: int, x: torch.Tensor, residual: torch.Tensor | None):
    from normquant.kernels.all_reduce_add_rms_norm_quant import plan_two_shot

    return plan_two_shot(x, residual, *settings, of_rows=m)


def call_in_pieces(rank: int, world: int, buffers: list[torch.Tensor]) -> int:
    from dataclasses import replace

    from shared.interpreter import repaired

    from normquant.distributed.pieces import in_pieces
    from normquant.kernels.configs import Config
    from normquant.kernels.exchange_layout import UNIT_BYTES, two_shot_bytes
    from normquant.kernels.parts_plan import Outputs

    room = -(-two_shot_bytes(4 * world, K, world) // UNIT_BYTES) * UNIT_BYTES
    group = replace(exchange(rank, buffers), half=room)
    with repaired():
        for number, (rows, spec) in enumerate(product((8, 11), SPECS)):
            m = 4 * world + rows  # three pieces, the last one with padding and without
            parts, residual = inputs(number, m, world, torch.bfloat16)
            given = residual if number % 2 else None
            expected = reference.all_reduce_add_rms_norm_quant(parts, given, weights(K), 1e-6, spec)
            settings = weights(K), 1e-6, 0.0, spec, Outputs(True, True), group, Config(4), False
            plan = partial(in_place, settings, m)
            call = in_pieces(plan, parts[rank], given, group)
            got = call(*(t for t in (parts[rank], given, weights(K)) if t is not None))
            assert_bitwise(got, list(expected))
            if spec.layout == "col_tma":
                scale, padding = got[1], -m % 4
                below = scale.as_strided((padding, scale.shape[1]), scale.stride(), m)
                assert not below.any(), "what lies below the last row is no zero"
    return ended(rank, buffers, group)


@pytest.mark.parametrize("world", [2, 3])
def test_more_rows_than_there_is_room_for_go_in_pieces(monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pieces = [-(-(4 * world + rows) // (4 * world)) for rows in (8, 11)]
    epochs = run_ranks(call_in_pieces, world, made_buffers(world), timeout=100)
    assert epochs == [len(SPECS) * sum(pieces)] * world and max(pieces) > 1


def call_pairs(rank: int, world: int, buffers: list[torch.Tensor], port: int) -> int:
    from shared.interpreter import repaired

    from normquant.distributed.algorithms import COLLECTIVE, ONE_SHOT, TWO_SHOT, Choice, GroupRunner
    from normquant.distributed.workspace import Workspace
    from normquant.kernels.configs import Config
    from normquant.ops._group_calls import runners

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    group, memory = dist.group.WORLD, exchange(rank, buffers)
    with repaired():
        for number, (m, algorithm) in enumerate(product((1, 5), (ONE_SHOT, TWO_SHOT, COLLECTIVE))):
            workspace = Workspace(group, torch.device("cpu"), 30.0, number, buffers[rank], memory)
            choice = Choice(algorithm, Config(4))
            runners[group.group_name] = GroupRunner(workspace, lambda *_, choice=choice: choice)
            check_pair(group, number, m)
    return ended(rank, buffers, memory)


def check_pair(group: dist.ProcessGroup, number: int, m: int) -> None:
    """What a GPU is given to launch, launched in the interpreter."""
    from normquant.linear import GROUP_PAIRS
    from normquant.linear.split_product import split_product

    add, spec = number % 2 == 0, SPECS[0]
    given = [factors(m, K, K, x=activations(m, K, seed=r)) for r in range(group.size())]
    parts = torch.stack([split_product(*factor, torch.bfloat16) for factor in given])
    residual = activations(m, K, seed=99) if add else None
    expected = reference.all_reduce_add_rms_norm_quant(parts, residual, weights(K), 1e-6, spec)
    tensors = [t for t in (residual, weights(K)) if t is not None]
    pair = GROUP_PAIRS[f"all_reduce_{'add_' * add}rms_norm_quant_with_norm"]
    rest = (1e-6, 0.0, False, group.group_name, spec.encode())
    assert_bitwise(list(pair.cuda(*given[group.rank()], torch.bfloat16, "always", "", *tensors, *rest)), list(expected))


def test_a_pair_launches_the_product_and_a_kernel_that_reads_its_partial_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert run_ranks(call_pairs, 2, made_buffers(2), free_port(), timeout=200) == [4, 4]
