"""The quantization kernel, interpreted on CPU, against the reference: equal to the bit."""

import interpreter
import pytest
import torch
from compare import assert_bitwise, pad_rows
from inputs import awkward

from normquant import QuantSpec, reference, specs
from normquant.kernels.launch import Config


def check(x, spec, split=1):
    got = interpreter.run("group_quant", x, spec, Config(4, split))
    assert_bitwise(got, reference.group_quant(x, spec))
    if spec.layout == "col_tma":
        assert not pad_rows(got[1], spec.scale_rows(len(x))).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [128, 512, 1536, 2304, 7168])
def test_every_size(k, dtype):
    for m in (0, 1, 9):
        check(awkward(m, k, dtype, strided=k == 1536), QuantSpec(layout="col_tma"), split=2 if k == 7168 else 1)


@pytest.mark.parametrize("name", [name for name in vars(specs) if name.isupper()])
def test_every_named_spec(name):
    check(awkward(9, 1536), getattr(specs, name))


@pytest.mark.parametrize("scale", ["fp32", "ue8m0", "ue8m0_packed"])
@pytest.mark.parametrize("group", [128, 64, 32])
def test_every_format(group, scale):
    check(awkward(9, 2304), QuantSpec(group=group, scale=scale, layout="col_tma"), split=3)


def test_every_value_and_every_amax():
    # All finite bf16 values against 32 amax: ties of the division, saturation and the smallest results.
    every = torch.arange(0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    mantissas = torch.arange(128, 256, 4).float().bfloat16()
    for spec in (QuantSpec(), QuantSpec(divide="reciprocal"), QuantSpec(divide="amax"), QuantSpec(scale="ue8m0")):
        small = every[(every <= 1) & (every >= 2**-16)][: 127 * 16]  # normal values up to one, 127 a group
        for amax in mantissas:
            x = torch.cat([small.view(-1, 127), torch.ones(16, 1, dtype=torch.bfloat16)], 1) * amax / 256
            check(x.contiguous(), spec)
