"""The block-FP8 linear layer copied, pickled, saved and loaded."""

import copy
import io
import pickle

import pytest
import torch
from shared.compare import assert_bitwise
from shared.inputs import activations
from shared.linear_weights import linear

from normquant import BlockFP8Linear

BF16 = torch.bfloat16


def test_state_dict_round_trip():
    layer, other = BlockFP8Linear.from_linear(linear(True)), BlockFP8Linear.from_linear(linear(True))
    with torch.no_grad():
        for t in other.state_dict().values():
            t.zero_()
    x = activations(5, 384)
    assert not torch.equal(other(x), layer(x))
    assert set(layer.state_dict()) == {"weight", "weight_scale_inv", "bias"}
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    assert other.load_state_dict(torch.load(file, weights_only=True)).missing_keys == []
    assert_bitwise([other(x)], [layer(x)])
    # still as cuBLASLt reads it
    assert other.weight_scale.stride() == (4, 1)
    assert other.state_dict()["weight_scale_inv"].shape == (3, 3)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": lambda m: _saved(m, weights_only=False),
}


def _saved(value, **how):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **how)


@pytest.mark.parametrize("name", COPIES)
def test_copies(name):
    layer = BlockFP8Linear.from_linear(linear(True, torch.float16))
    other = COPIES[name](layer)
    x = activations(5, 384, torch.float16)
    assert_bitwise([other(x)], [layer(x)])
    assert other.weight.dtype == torch.float16 and other.weight_fp8 is not layer.weight_fp8
    assert other.weight_scale.stride() == (4, 1)


def empty_on_meta() -> BlockFP8Linear:
    with torch.device("meta"):
        return BlockFP8Linear.from_linear(torch.nn.Linear(384, 300, dtype=BF16))


@pytest.mark.parametrize("assign", [False, True])
def test_a_layer_made_on_meta_loads_a_checkpoint(assign):
    layer, other = BlockFP8Linear.from_linear(linear(True)), empty_on_meta()
    for dtype in (BF16, torch.float32):
        assert other(torch.empty(5, 384, dtype=dtype, device="meta")).shape == (5, 300)
    other = other if assign else other.to_empty(device="cpu")
    other.load_state_dict(_saved(layer.state_dict()), assign=assign)
    x = activations(5, 384)
    assert_bitwise([other(x)], [layer(x)])
    assert other.weight_scale.stride() == (4, 1) and not other.weight_fp8.requires_grad


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("key", ["weight_scale_inv", "weight_scale"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu])
def test_scales_of_a_checkpoint(dtype, key, assign):
    layer = BlockFP8Linear.from_linear(linear(False))
    scale = torch.exp2(torch.arange(9.0).view(3, 3) - 4).to(dtype)
    model = torch.nn.Sequential(layer)
    model.load_state_dict({"0.weight": layer.weight_fp8.detach().clone(), f"0.{key}": scale}, assign=assign)
    assert layer.weight_scale.dtype == torch.float32 and layer.weight_scale.stride() == (4, 1)
    assert torch.equal(layer.weight_scale, scale.float())
    assert torch.equal(BlockFP8Linear(layer.weight_fp8, scale).weight_scale, scale.float())


BAD_CHECKPOINTS = {
    "bf16 weight": (lambda s: s | {"weight": s["weight"].bfloat16()}, "weight is torch.bfloat16"),
    "no scale": (lambda s: {k: t for k, t in s.items() if "scale" not in k}, "weight_scale_inv"),
    "no weight": (lambda s: {k: t for k, t in s.items() if k != "weight"}, '"weight"'),
    "two scales": (lambda s: s | {"weight_scale": s["weight_scale_inv"]}, "Unexpected key"),
    "float64 scale": (lambda s: s | {"weight_scale_inv": s["weight_scale_inv"].double()}, "torch.float64"),
    "other shape": (lambda s: s | {"weight_scale_inv": s["weight_scale_inv"][:2]}, "size mismatch"),
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_bad_checkpoints(name, assign):
    change, sentence = BAD_CHECKPOINTS[name]
    layer = BlockFP8Linear.from_linear(linear(True))
    state = {key: t.clone() for key, t in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match=sentence):
        layer.load_state_dict(change(state), assign=assign)
    assert (layer.weight_fp8.dtype, layer.weight_scale.dtype) == (torch.float8_e4m3fn, torch.float32)
