"""The block-FP8 product on DTensors: two processes on gloo."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from shared.inputs import activations
from shared.ranks import free_port, run_ranks

import normquant as nq
from normquant.linear import quantize_weight
from normquant.linear._sharding import rules
from normquant.ops import register_sharding

RANKS, M, N, K = 2, 6, 512, 1024
ARGUMENTS = "data", "scale", "weight", "weight_scale"
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


def product(*args):
    return torch.ops.normquant.block_fp8_linear(*args, torch.float32)


def tensors(m: int = M, n: int = N, k: int = K) -> tuple[torch.Tensor, ...]:
    """Small integers and powers of two, whose sums of products are exact in any order."""

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-8, 9, shape, generator=generator).float()

    generator = torch.Generator().manual_seed(0)
    data, weight = (integers(rows, k).to(torch.float8_e4m3fn) for rows in (m, n))
    scale, weight_scale = (integers(-(-rows // b), k // 128).div(4).ceil().exp2() for rows, b in ((m, 1), (n, 128)))
    return data, scale, weight, weight_scale


def mesh():
    return dist.device_mesh.init_device_mesh("cpu", (RANKS,))


def distributed(whole, **place: int):
    """Each argument as a DTensor, sharded along the dimension that `place` has for it."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    named = zip(ARGUMENTS, whole, strict=True)
    placed = [(t, [Shard(place[n]) if n in place else Replicate()]) for n, t in named]
    return [distribute_tensor(t, mesh(), p, src_data_rank=None) for t, p in placed]  # gloo sends no fp8


def check(whole, dim: int | None, **place: int) -> None:
    """dim: that along which the output has to be sharded, None where every rank has to have all of it."""
    from torch.distributed.tensor import Replicate, Shard

    out, expected = product(*distributed(whole, **place)), product(*whole)
    assert out.placements == (Replicate() if dim is None else Shard(dim),), (place, out.placements)
    assert out.shape == expected.shape and out.dtype == expected.dtype
    part = expected if dim is None else expected.chunk(RANKS, dim)[dist.get_rank()]
    assert torch.equal(out.to_local(), part), place


def rows() -> None:
    check(tensors(), 0, data=0, scale=0)
    check(tensors(), 0, data=0)  # scale follows
    check(tensors(m=5), 0, data=0, scale=0)  # of another number on the last rank


def columns_of_the_output() -> None:
    check(tensors(), 1, weight=0, weight_scale=0)
    check(tensors(), 1, weight=0)
    check(tensors(n=N + 128), None, weight_scale=0)  # five blocks: a rank would have half of one
    check(tensors(n=N + 64), None, weight_scale=0)


def parts_of_the_sum() -> None:
    from torch.distributed.tensor import Partial

    whole = tensors()
    shards = zip(*(t.chunk(RANKS, 1) for t in whole), strict=True)
    parts = [product(*(t.contiguous() for t in shard)) for shard in shards]
    for names in (ARGUMENTS, ARGUMENTS[:2], ARGUMENTS[2:]):  # the others follow, for nothing
        out = product(*distributed(whole, **dict.fromkeys(names, 1)))
        assert out.placements == (Partial(),), names
        assert torch.equal(out.to_local(), parts[dist.get_rank()]), names
        assert torch.equal(out.full_tensor(), product(*whole)), names
    check(whole, None, weight_scale=1)  # which alone is gathered: the sum stays whole
    check(tensors(k=K + 128), None, weight_scale=1)


def layers() -> None:
    """Column-parallel, then row-parallel, as in an MLP."""
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

    x = activations(M, K)
    up, down = quantize_weight(activations(2048, K, seed=2)), quantize_weight(activations(256, 2048, seed=3))

    def model(x, up, down):
        return nq.block_fp8_linear(nq.group_quant(nq.block_fp8_linear(nq.group_quant(x), *up)), *down)

    def placed(pair, dim):
        return [distribute_tensor(t, mesh(), [Shard(dim)], src_data_rank=None) for t in pair]

    out = model(distribute_tensor(x, mesh(), [Replicate()]), placed(up, 0), placed(down, 1))
    assert out.placements == (Partial(),)
    expected = model(x, up, down).float()
    assert (out.full_tensor().float() - expected).norm() < 2**-7 * expected.norm()  # each part is rounded to bf16


CASES = rows, columns_of_the_output, parts_of_the_sum, layers


def rank_of(rank: int, world: int, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    register_sharding()
    register_sharding()
    for case in CASES:
        case()
    dist.destroy_process_group()


def test_on_two_ranks():
    run_ranks(rank_of, RANKS, free_port())


@pytest.mark.parametrize(("n", "k", "sharded", "accepted"), [
    (512, 1024, {}, "R S0 S1"),
    (512, 1024, {"data": 1}, "R S0 S1 P"),
    (512, 1024, {"weight": 1}, "R S0 S1 P"),
    (512, 1024, {"weight": 0}, "R S0 S1"),
    (512, 1024, {"scale": 1, "weight_scale": 1}, "R S0 S1"),
    (640, 1024, {"weight": 0}, "R S0"),
    (576, 1024, {"weight": 0}, "R S0"),
    (512, 1152, {"data": 1, "weight": 1}, "R S0 S1"),
])  # fmt: skip
def test_shards_hold_whole_blocks(n, k, sharded, accepted):
    """What has to be moved for it is left to torch; gloo, above, does not move fp8."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    letters = {Replicate(): "R", Shard(0): "S0", Shard(1): "S1", Partial(): "P"}
    shapes = (M, k), (M, k // 128), (n, k), (-(-n // 128), k // 128)
    given = [
        SimpleNamespace(
            shape=shape,
            mesh=SimpleNamespace(size=lambda: RANKS),
            placements=(Shard(sharded[name]) if name in sharded else Replicate(),),
        )
        for name, shape in zip(ARGUMENTS, shapes, strict=True)
    ]
    found = rules(*given, torch.bfloat16)
    assert " ".join(letters[out] for (out,), _ in found) == accepted
    assert all(len(arguments) == 5 and arguments[4] is None for _, arguments in found)
