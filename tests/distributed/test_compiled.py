"""The ops of a group reached through the compile pass: a tiny DeepSeek-V3 on four ranks over gloo, and faults.

The graphs that Inductor would lower are run eagerly, as they are or rewritten."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from shared import traced_graphs
from shared.compare import assert_bitwise
from shared.inputs import activations, weights
from shared.linear_weights import weight_of
from shared.ranks import free_port, run_ranks
from torch.fx import Graph

from normquant import QuantSpec, block_fp8_linear, distributed, group_quant, quantize_weight, reference
from normquant.compile import Site, driver
from normquant.compile.policy import Rules
from normquant.distributed import MissingRank
from normquant.linear.split_product import split_product

INNER = 640  # of a product: five blocks, in two parts
K, LIMIT_S = 256, 400.0  # a start of several processes on a busy machine


def join(rank: int, world: int, port: int, timeout_s: float = 60.0, opened: bool = True) -> dist.ProcessGroup:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    group = dist.group.WORLD
    if opened:
        distributed.open_workspace(group, K, timeout_s=timeout_s)
    return group


def run(
    fn: Any, *args: torch.Tensor, all_reduce: bool = True, products: Any = "auto"
) -> tuple[Any, list[Site], list[str]]:
    fusions = driver.ALL_REDUCE_FUSIONS if all_reduce else driver.FUSIONS

    def rewrite(graph: Graph) -> tuple[Site, ...]:
        report = driver.run(graph, Rules("always", products=products), strict=True, fusions=fusions)
        return *report.sites, *report.others

    return traced_graphs.run(rewrite, fn, *args)


def deepseek(rank: int, world: int, port: int) -> tuple[list[str], list[str], torch.Tensor, torch.Tensor]:
    from shared import tensor_parallel_model as model

    group = join(rank, world, port)
    args = model.inputs()
    fused, sites, left = run(model.Model(rank, world, model.all_reduce(group)), *args)
    ordered = model.Model(rank, world, model.rank_order_sum(group))
    apart, _, _ = run(ordered, *args, all_reduce=False)
    assert torch.equal(fused, apart), "not the bits of the sum in rank order"
    with torch.no_grad():
        off = ordered(*args)
        alone = model.Model(0, 1, lambda x: x)(*args)
    assert relative(fused, off) < 0.01  # the order of the norm's sum of squares moves a value across a step of FP8
    return [str(site) for site in sites], left, fused, alone


def test_a_tiny_deepseek_has_the_bits_of_the_rank_order_sum_and_every_rank_decides_alike() -> None:
    found = run_ranks(deepseek, 4, free_port(), timeout=LIMIT_S)
    sites, left, fused, alone = found[0]
    for others in found[1:]:
        assert others[:2] == (sites, left) and torch.equal(others[2], fused)
    ours = [name for name in left if "all_reduce" in name]
    assert ours == [f"normquant.all_reduce_add_rms_norm{end}.default" for end in ("_quant", "_quant", "_quant", "")]
    assert len([site for site in sites if site.startswith("fused") and "all_reduce" in site]) == 4
    assert not any("c10d" in name for name in left) and not any("stays" in site for site in sites)
    assert relative(fused, alone) < 0.1  # one process rounds no parts, which moves values across steps of FP8, of 6 %


def relative(given: torch.Tensor, expected: torch.Tensor) -> float:
    return float((given.float() - expected.float()).norm() / expected.float().norm())


def block(group: dist.ProcessGroup, weight: torch.Tensor) -> Any:
    def fn(x, residual):
        h = funcol.all_reduce(x * 2, "sum", group) + residual
        return torch.nn.functional.rms_norm(h, (K,), weight, 1e-6), h

    return fn


def row_parallel(rank: int, world: int, port: int) -> list[str]:
    group, weight, spec = join(rank, world, port), weights(K), QuantSpec(layout="col_tma")
    inputs = [activations(4, INNER, seed=r) for r in range(world)]
    shards = [quantize_weight(weight_of(K, INNER) * (r + 1)) for r in range(world)]

    def fn(x, residual):
        part = block_fp8_linear(group_quant(x, spec=spec), *shards[rank])
        total = funcol.all_reduce(part, "sum", group) + residual
        q = group_quant(torch.nn.functional.rms_norm(total, (K,), weight, 1e-6), spec=spec)
        return q.data, q.scale, total

    residual = activations(4, K, seed=9)
    with distributed.checking_agreement(group):
        got, sites, left = run(fn, inputs[rank], residual, products="always")
    quantized = [group_quant(x, spec=spec) for x in inputs]
    parts = torch.stack(
        [split_product(q.data, q.scale, *w, torch.bfloat16) for q, w in zip(quantized, shards, strict=True)]
    )
    expected = reference.all_reduce_add_rms_norm_quant(parts, residual, weight, 1e-6, QuantSpec.decode(sites[0].spec))
    assert_bitwise(list(got), list(expected[:3]))
    return [name for name in left if "all_reduce" in name]


def test_a_row_parallel_product_is_split_and_its_sum_sent() -> None:
    for left in run_ranks(row_parallel, 2, free_port(), timeout=LIMIT_S):
        assert left == ["normquant.block_fp8_linear_all_reduce_add_rms_norm_quant.default"]


def disagreement(rank: int, world: int, port: int) -> list[str]:
    group = join(rank, world, port)
    weight = weights(K)
    x, residual = activations(4, K, seed=rank), activations(4, K, seed=9)
    with distributed.checking_agreement(group):
        _, sites, _ = run(block(group, weight), x, residual)
    assert [site.op for site in sites] == ["all_reduce_add_rms_norm"]
    told = []
    other_weight = weight + (rank == 2)
    rows = 3 if rank == 1 else 4
    for given, part in ((other_weight, x), (weight, x[:rows]), (weight, x.half() if rank == 1 else x)):
        with distributed.checking_agreement(group), pytest.raises(ValueError) as caught:
            run(block(group, given), part, residual[: len(part)].to(part.dtype))
        told.append(str(caught.value))
    return told


def test_a_weight_a_size_or_a_dtype_that_differs_is_an_error_on_every_rank() -> None:
    for weight, size, dtype in run_ranks(disagreement, 3, free_port(), timeout=LIMIT_S):
        assert "rank 2" in weight and "weight 0" in weight
        assert "rank 1" in size and "rows 3" in size
        assert "rank 1" in dtype and "float16" in dtype


def death(rank: int, world: int, port: int) -> str:
    group = join(rank, world, port, timeout_s=3.0)
    args = activations(2, K, seed=rank), activations(2, K, seed=9)
    run(block(group, weights(K)), *args)  # all have compiled
    if rank == 1:
        os._exit(0)
    with pytest.raises(MissingRank) as caught:
        run(block(group, weights(K)), *args)
    return str(caught.value)


def test_a_rank_that_dies_is_named_through_compiled_code() -> None:
    first, _, last = run_ranks(death, 3, free_port(), timeout=LIMIT_S, silent=(1,))
    for text in (first, last):
        assert "rank 1 has left" in text or "rank 1 has not sent" in text


def first_calls(rank: int, world: int, port: int) -> str:
    group = join(rank, world, port, opened=False)
    distributed.open_at_first_call(rows=16)
    weight, residual = weights(K), activations(4, K, seed=9)
    assert group.group_name not in distributed.workspaces
    run(block(group, weight), activations(4, K, seed=rank), residual)
    assert group.group_name in distributed.workspaces
    with pytest.raises(ValueError) as caught:  # still the first run of a model, by its number of rows
        run(block(group, weight + rank), activations(4, K, seed=rank), residual)
    run(block(group, weight + rank), activations(2, K, seed=rank), residual[:2])
    return str(caught.value)


def test_a_first_call_opens_the_workspace_and_compares_until_the_rows_change() -> None:
    for text in run_ranks(first_calls, 2, free_port(), timeout=LIMIT_S):
        assert "rank 1" in text and "weight 0" in text
