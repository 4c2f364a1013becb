"""The gated norm of heads, interpreted on CPU, against the reference: equal to the bit."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from shared import interpreter
from shared.compare import assert_bitwise, bits, pad_rows
from shared.inputs import activations, awkward, weights

from normquant import QuantSpec, reference, specs
from normquant.kernels.configs import Config

NAMED = [name for name in vars(specs) if name.isupper()]
ROUNDINGS = ("none", "inner", "once", "twice")
TMA = QuantSpec(layout="col_tma")


def check(x, z, weight, spec, config=None, eps=1e-6):
    got = interpreter.run("gated_norm_quant", x, z, weight, eps, spec, config or Config(4))
    assert_bitwise(got, reference.gated_norm_quant(x, z, weight, eps, spec))
    if spec.layout == "col_tma":
        assert not pad_rows(got[1], spec.scale_rows(len(x))).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "d"), [(1, 128), (32, 128), (3, 256), (6, 64), (24, 16), (2, 1024)])
def test_every_size(heads, d, dtype):
    for m, strided in ((0, False), (1, True), (9, False), (9, True)):
        k = heads * d  # rows of z are another distance apart than those of x
        x, z = awkward(m, k, dtype, strided=strided), awkward(m, k, dtype, seed=3, strided=not strided)
        check(x, z, weights(d, dtype), TMA)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_every_rounding_and_weight(weight_dtype, rounding):
    spec = QuantSpec(rounding=rounding)
    check(awkward(9, 512), awkward(9, 512, seed=1), weights(128, weight_dtype), spec, eps=1e-5)


@pytest.mark.parametrize("name", NAMED)
def test_every_named_spec(name):
    check(awkward(9, 1536), awkward(9, 1536, seed=1), weights(256), getattr(specs, name))


@pytest.mark.parametrize("scale", ["fp32", "ue8m0", "ue8m0_packed"])
@pytest.mark.parametrize("group", [128, 64, 32])
@pytest.mark.parametrize("d", [32, 256])
def test_every_format(d, group, scale):
    spec = QuantSpec(group=group, scale=scale, layout="col_tma")
    check(awkward(9, 1280), awkward(9, 1280, seed=1), weights(d), spec, Config(4, split=3))


@pytest.mark.parametrize("d", [64, 128, 1024])
def test_every_config_gives_the_same_bits(d):
    x, z, weight = awkward(9, 2048), activations(9, 2048, seed=1), weights(d)
    for warps, (split, rows) in product((1, 8), ((1, 1), (4, 1), (16, 1), (1, 4))):
        check(x, z, weight, TMA, Config(warps, split, rows))


def test_a_row_has_one_result():
    x, z, weight = awkward(33, 1024), activations(33, 1024, seed=1), weights(128)
    whole = interpreter.run("gated_norm_quant", x, z, weight, 1e-6, TMA)
    for m in (1, 8):
        some = interpreter.run("gated_norm_quant", x[:m], z[:m], weight, 1e-6, TMA)
        for part, rows in zip(some, whole, strict=True):
            assert torch.equal(bits(part), bits(rows[:m]))


def test_a_nan_stays_in_its_head():
    x, z = activations(1, 512), activations(1, 512, seed=1)
    x[0, 130] = z[0, 260] = float("nan")  # of the second head, and of the gate of the third
    data, scale = interpreter.run("gated_norm_quant", x, z, weights(128), 1e-6, QuantSpec())
    assert data.float().isnan().view(4, 128).all(1).tolist() == [False, True, True, False]  # as its scale is NaN
    assert scale.isnan().tolist() == [[False, True, True, False]]


def test_the_reference_is_the_eager_model():
    x, z, weight = activations(64, 4096), activations(64, 4096, seed=1), weights(128)
    h = x.view(64, 32, 128).float()
    n = weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
    eager = reference.group_quant((n * F.silu(z.view(64, 32, 128).float())).to(x.dtype).view(64, 4096), QuantSpec())
    ours = reference.gated_norm_quant(x, z, weight, 1e-6, QuantSpec(rounding="twice"))
    # the sum of squares is in another order, and torch's own silu vectorizes exp differently
    assert (eager[0].float() != ours[0].float()).float().mean() <= 1e-4
