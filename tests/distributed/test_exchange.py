"""The kernels of several ranks against each other: a process for each, in Triton's interpreter, over shared memory."""

from __future__ import annotations

import os
import random
import time
from itertools import product

import pytest
import torch
from shared.compare import assert_bitwise
from shared.inputs import activations, awkward, weights
from shared.ranks import run_ranks

from normquant import QuantSpec, reference

K = 640
HALF = 1 << 20
SPECS = (
    QuantSpec(layout="col_tma"),
    QuantSpec(scale="ue8m0_packed", layout="col_tma", sum="rounded", rounding="twice"),
    QuantSpec(group=64, scale="ue8m0"),
)
ROWS = (1, 5, 2, 8, 3, 11)


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


def call_all(rank: int, world: int, buffers: list[torch.Tensor], delays: bool) -> int:
    from shared.interpreter import repaired

    group, clock = exchange(rank, buffers), random.Random(rank)
    with repaired():
        for number, (m, spec) in enumerate(product(ROWS, SPECS)):
            if delays:
                time.sleep(clock.choice((0, 0, 0.05)))
            check_call(group, number, m, spec, (torch.bfloat16, torch.float16)[number // 2 % 2])
    halves = buffers[rank][64:]
    assert (halves == -1).all(), "what was read was not cleared"
    return int(group.state[0])


def check_call(group, number: int, m: int, spec: QuantSpec, dtype: torch.dtype) -> None:
    from normquant.kernels import all_reduce_add_rms_norm_quant as kernels
    from normquant.kernels.configs import Config
    from normquant.kernels.launch import Launch
    from normquant.kernels.parts_plan import Outputs

    algorithm = ("one shot", "two shots", "sharded")[number % 3]
    wanted = Outputs(*((True, False), (True, True), (False, True))[number // 3 % 3])
    chunk = -(-m // group.world)
    own = slice(group.rank * chunk, (group.rank + 1) * chunk) if algorithm == "sharded" else slice(0, m)
    parts, residual = inputs(number, m, group.world, dtype)
    residual = residual if number % 4 else None
    expected = reference.all_reduce_add_rms_norm_quant(parts, residual, weights(K), 1e-6, spec)
    args = (parts[group.rank], residual, weights(K), 1e-6, 0.0, spec, wanted, group, Config(4))
    if algorithm == "one shot":
        plan = kernels.plan_one_shot(*args)
    else:
        plan = kernels.plan_two_shot(*args, algorithm == "sharded")
    tensors = (parts[group.rank], residual, weights(K), group.table, group.state)
    outputs = Launch(plan)(*(t for t in tensors if t is not None))
    *quantized, total, norm = expected
    outputs[2 * wanted.quantized] = outputs[2 * wanted.quantized][own]
    assert_bitwise(outputs, [*quantized * wanted.quantized, total[own], *[norm] * wanted.normed])


@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_algorithm_gives_the_bits_of_the_reference(monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    buffers = [torch.full((64 + 2 * HALF // 4,), -1, dtype=torch.int32).share_memory_() for _ in range(world)]
    for buffer in buffers:
        buffer[:64] = 0
    epochs = run_ranks(call_all, world, buffers, world == 3, timeout=100)
    assert epochs == [len(ROWS) * len(SPECS)] * world
    assert "TRITON_INTERPRET" in os.environ
