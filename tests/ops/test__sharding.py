"""The ops on DTensors: two processes on gloo."""

import pytest
import torch
import torch.distributed as dist
from shared.compare import bits
from shared.ranks import free_port, run_ranks

import normquant as nq
from normquant import QuantSpec
from normquant.ops import OPS, Examples, latent_norm_quant, register_sharding, silu_mul_quant

RANKS, M, K = 2, 6, 1024
SPECS = QuantSpec(), QuantSpec(layout="col_tma", scale="ue8m0_packed"), QuantSpec(layout="col", group=64)
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


def arguments(op, k: int = K) -> dict:
    return op.example(Examples(M, 768 if op.name == "rope_last" else k, "cpu", latent=(256, 32)))  # heads of 192


def check(op, args: dict, spec: QuantSpec, place: dict, dim: int | None) -> None:
    """`place`: placements of the arguments that are not replicated. dim: in which outputs are sharded, or None."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = dist.device_mesh.init_device_mesh("cpu", (RANKS,))
    expected = torch.utils._pytree.tree_leaves(op.overload(*args.values(), spec.encode()))
    given = {
        name: distribute_tensor(a, mesh, [place.get(name, Replicate())]) if isinstance(a, torch.Tensor) else a
        for name, a in args.items()
    }
    outputs = torch.utils._pytree.tree_leaves(op.overload(*given.values(), spec.encode()))
    for out, whole in zip(outputs, expected, strict=True):
        assert out.placements == (Replicate() if dim is None else Shard(dim),), (op.name, out.placements)
        assert out.shape == whole.shape and out.dtype == whole.dtype
        part = whole if dim is None else whole.chunk(RANKS, dim)[dist.get_rank()]
        assert torch.equal(bits(out.to_local()), bits(part)), op.name


def rows() -> None:
    from torch.distributed.tensor import Shard

    for op in OPS.values():
        for spec in SPECS:
            args = arguments(op)
            check(op, args, spec, {name: Shard(0) for name in ("x", "residual", "z", "positions") if name in args}, 0)
            check(op, args, spec, {"x": Shard(0)}, 0)  # the others follow


def columns() -> None:
    """Whole groups stay where they are; a norm needs its whole row."""
    from torch.distributed.tensor import Shard

    for spec in SPECS:
        check(OPS["group_quant"], arguments(OPS["group_quant"]), spec, {"x": Shard(1)}, 1)
        check(OPS["group_quant"], arguments(OPS["group_quant"], 384), spec, {"x": Shard(1)}, None)
        check(OPS["rms_norm_quant"], arguments(OPS["rms_norm_quant"]), spec, {"x": Shard(1), "weight": Shard(0)}, None)
        check(OPS["silu_mul_quant"], arguments(OPS["silu_mul_quant"]), spec, {"x": Shard(1)}, None)


def angles() -> None:
    """Without positions, row i of x has row i of cos and sin: sharded with it, or none is."""
    from torch.distributed.tensor import Shard

    op = OPS["latent_norm_quant"]
    more = arguments(op) | {"positions": None}
    check(op, more, SPECS[0], {"x": Shard(0)}, None)
    as_many = more | {name: more[name][:M] for name in ("cos", "sin")}
    check(op, as_many, SPECS[0], {"x": Shard(0)}, 0)


def gradients() -> None:
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = dist.device_mesh.init_device_mesh("cpu", (RANKS,))
    x, weight = (distribute_tensor(torch.ones(s, dtype=torch.bfloat16), mesh, [Replicate()]) for s in ((M, K), (K,)))
    weight.requires_grad_()
    y, angles = x * weight, torch.ones(M, 16)
    calls = (
        lambda: nq.rms_norm_quant(x, weight),
        lambda: nq.add_rms_norm_quant(x, x, weight),
        lambda: nq.group_quant(y),
        lambda: silu_mul_quant(y),
        lambda: latent_norm_quant(y, x[0, :512], x[0, :256], angles, angles),
    )
    for call in calls:
        with pytest.raises(RuntimeError, match="has no gradient"):
            call()


CASES = {"gradients": gradients, "rows": rows, "columns": columns, "angles": angles}


def rank_of(rank: int, world: int, port: int, name: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    register_sharding()
    register_sharding()  # once more changes nothing
    CASES[name]()
    dist.destroy_process_group()


@pytest.mark.parametrize("name", CASES)
def test_on_two_ranks(name):
    run_ranks(rank_of, RANKS, free_port(), name)
