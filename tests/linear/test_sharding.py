"""Block-FP8 layers under fully_shard and DTensor: two processes on gloo."""

import pytest
import torch
import torch.distributed as dist
from shared.inputs import activations
from shared.ranks import free_port, run_ranks
from torch import nn

import normquant as nq
from normquant import BlockFP8Linear

RANKS = 2
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nq.block_fp8(nn.Sequential(*(nn.Linear(256, 256, dtype=torch.bfloat16) for _ in range(2))))


def mesh():
    return dist.device_mesh.init_device_mesh("cpu", (RANKS,))


def shards() -> None:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    model, expected = model_of(), model_of()
    for layer in model:
        fully_shard(layer, mesh=mesh())
    fully_shard(model, mesh=mesh())
    x = activations(5, 256)
    for _ in range(2):  # the second forward gathers anew
        assert torch.equal(model(x), expected(x))
    weight = dict(model.named_parameters())["0.weight_fp8"]
    assert weight.dtype == torch.float8_e4m3fn and weight.to_local().shape == (256 // RANKS, 256)
    state = get_model_state_dict(model)
    assert state.keys() == expected.state_dict().keys()
    rows = slice(*(256 // RANKS * (dist.get_rank() + i) for i in (0, 1)))
    assert torch.equal(state["0.weight"].to_local().float(), expected[0].weight_fp8[rows].float())
    assert model[0].weight.dtype == torch.bfloat16 and model[0].weight.shape == (256, 256)


def conversion() -> None:
    from torch.distributed.fsdp import fully_shard

    model, expected = model_of(), model_of().half()
    fully_shard(model, mesh=mesh())
    model.half()
    assert model[0].weight_fp8.dtype == torch.float8_e4m3fn and model[0].bias.dtype == torch.float16
    assert torch.equal(model(activations(5, 256).half()), expected(activations(5, 256).half()))


def casts_parameters() -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = fully_shard(model_of(), mesh=mesh(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"cast to torch.bfloat16.*fully_shard of their own"):
        model(activations(5, 256))


def refuses_dtensors() -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Shard

    plain = nn.Sequential(nn.Linear(256, 256, dtype=torch.bfloat16))
    fully_shard(plain, mesh=mesh())
    layer = model_of()[0]
    sharded = nn.Parameter(DTensor.from_local(layer.weight_fp8.detach()[:128], mesh(), [Shard(0)]), requires_grad=False)
    layer.weight_fp8 = sharded
    for call in (
        lambda: nq.block_fp8(plain),
        lambda: BlockFP8Linear.from_linear(plain[0]),
        lambda: layer(activations(5, 256)),
    ):
        with pytest.raises(ValueError, match=r"DTensor.*before fully_shard"):
            call()


CASES = {"fully_shard": shards, "half": conversion, "cast": casts_parameters, "DTensor": refuses_dtensors}


def rank_of(rank: int, world: int, port: int, name: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    CASES[name]()
    dist.destroy_process_group()


@pytest.mark.parametrize("name", CASES)
def test_on_two_ranks(name):
    run_ranks(rank_of, RANKS, free_port(), name)
