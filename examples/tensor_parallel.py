"""Tensor parallelism by hand: MLP blocks whose down projections give each rank a part of a sum.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py            # on GPUs over NCCL, without one over gloo
    torchrun --nproc-per-node 4 examples/tensor_parallel.py --sharded  # each rank keeps its own rows of the residual
    torchrun --nproc-per-node 2 examples/tensor_parallel.py --compile  # written with torch's all-reduce, and compiled

All-reduce, residual add, norm and quantization between two blocks are one op. Every rank also computes the same model
alone, with the parts of all ranks, and compares the bits.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives

import normquant as nq
from normquant import distributed, reference

HIDDEN, INTERMEDIATE, BLOCKS, EPS = 512, 1024, 3, 1e-6
SPEC = nq.QuantSpec(layout="col_tma", sum="rounded")  # the residual is rounded before the norm reads it, as in torch
Quantized = tuple[torch.Tensor, torch.Tensor]  # fp8 values, scales


@dataclass(frozen=True)
class Shard:
    """One rank's part of a block, in block-FP8: columns of gate and up, rows of down."""

    gate_up: Quantized  # [2 * INTERMEDIATE / ranks, HIDDEN]
    down: Quantized  # [HIDDEN, INTERMEDIATE / ranks]

    def __call__(self, q: nq.QuantizedActivation) -> torch.Tensor:
        """A part of the block's output, [M, HIDDEN] bf16."""
        hidden = nq.silu_mul_quant(nq.block_fp8_linear(q, *self.gate_up), spec=SPEC)
        return nq.block_fp8_linear(hidden, *self.down)


@dataclass(frozen=True)
class Block:
    """The shards of all ranks, and the weight of the norm that follows."""

    shards: list[Shard]
    norm: torch.Tensor


def blocks(world: int, device: torch.device) -> list[Block]:
    """The same blocks on every rank; a real model would load its own shard only."""
    torch.manual_seed(0)

    def shard() -> Shard:
        width = INTERMEDIATE // world
        gate_up, down = torch.randn(2 * width, HIDDEN) / HIDDEN**0.5, torch.randn(HIDDEN, width) / INTERMEDIATE**0.5
        both = (nq.quantize_weight(w.bfloat16().to(device)) for w in (gate_up, down))
        return Shard(*both)

    return [
        Block([shard() for _ in range(world)], torch.rand(HIDDEN).add(0.5).bfloat16().to(device)) for _ in range(BLOCKS)
    ]


# (the block, its quantized input, the residual) -> the next block's input, the new residual
Step = Callable[[Block, nq.QuantizedActivation, torch.Tensor], tuple[nq.QuantizedActivation, torch.Tensor]]


def run(model: list[Block], x: torch.Tensor, step: Step) -> tuple[nq.QuantizedActivation, torch.Tensor]:
    """All blocks: the last norm, quantized, and the residual."""
    q, residual = nq.rms_norm_quant(x, torch.ones_like(x[0]), EPS, spec=SPEC), x
    for block in model:
        q, residual = step(block, q, residual)
    return q, residual


def parallel_step(group: dist.ProcessGroup, sharded: bool) -> Step:
    """This rank's part of a block, and the op that brings the ranks together."""

    def step(block, q, residual):
        part = block.shards[group.rank()](q)
        return distributed.all_reduce_add_rms_norm_quant(
            part, residual, block.norm, EPS, group=group, spec=SPEC, sharded=sharded
        )

    return step


def traced_step(group: dist.ProcessGroup) -> Step:
    """The same in the words of torch, for the compile pass to find."""

    def step(block, q, residual):
        total = collectives.all_reduce(block.shards[group.rank()](q), "sum", group) + residual
        norm = torch.nn.functional.rms_norm(total, (HIDDEN,), block.norm, EPS)
        return nq.group_quant(norm, spec=SPEC), total

    return step


def lone_step(block: Block, q: nq.QuantizedActivation, residual: torch.Tensor):
    """The parts of all ranks in one process."""
    parts = torch.stack([shard(q) for shard in block.shards])  # [ranks, M, HIDDEN]
    data, scale, total, _ = reference.all_reduce_add_rms_norm_quant(parts, residual, block.norm, EPS, SPEC)
    return nq.QuantizedActivation(data, scale, SPEC), total


def join() -> tuple[dist.ProcessGroup, torch.device]:
    """The group of all ranks that torchrun started, and this rank's device."""
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    device = torch.device("cuda", dist.get_rank()) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    assert dist.group.WORLD is not None
    return dist.group.WORLD, device


def compiled(model: list[Block], group: dist.ProcessGroup) -> Callable[[torch.Tensor], tuple]:
    """The model in the words of torch, with its all-reduces fused; the first call compares the ranks' arguments."""
    options = nq.inductor_options("always", all_reduce=True)
    fused = torch.compile(lambda x: run(model, x, traced_step(group)), options=options, fullgraph=True)

    def call(x):
        with torch.no_grad(), distributed.checking_agreement(group):
            return fused(x)

    return call


def same_bits(group: dist.ProcessGroup, device: torch.device, args: argparse.Namespace) -> bool:
    """Whether the parallel model gives what one process gives."""
    model, sharded = blocks(group.size(), device), args.sharded
    x = torch.randn(args.rows, HIDDEN).bfloat16().to(device)
    distributed.check_agreement(group, x, [block.norm for block in model], eps=EPS)
    if args.compile:
        q, residual = compiled(model, group)(x)
        if not group.rank():
            print(nq.explain(), flush=True)
    else:
        q, residual = run(model, x, parallel_step(group, sharded))
    expected, expected_residual = run(model, x, lone_step)
    own = distributed.own_rows(args.rows, group.rank(), group.size()) if sharded else slice(None)
    return (
        torch.equal(q.data.view(torch.uint8), expected.data.view(torch.uint8))
        and torch.equal(q.scale, expected.scale)
        and torch.equal(residual[own], expected_residual[own])
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sharded", action="store_true", help="each rank keeps the rows of the residual that it owns")
    parser.add_argument("--compile", action="store_true", help="compiled with normquant's pass, the residual whole")
    parser.add_argument("--rows", type=int, default=7)
    args = parser.parse_args()
    group, device = join()
    workspace = distributed.open_workspace(group, HIDDEN)
    same = same_bits(group, device, args)
    print(f"{workspace}: {'the same bits as' if same else 'NOT the bits of'} one process", flush=True)
    distributed.close_workspace(group)
    dist.destroy_process_group()
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
