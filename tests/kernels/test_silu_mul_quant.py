"""The gated-product kernel, interpreted on CPU, against the reference: equal to the bit."""

import pytest
import torch
import torch.nn.functional as F
from shared import interpreter
from shared.compare import assert_bitwise
from shared.inputs import activations, awkward

from normquant import QuantSpec, reference, specs
from normquant.kernels.configs import Config


def check(x, spec, split=1):
    assert_bitwise(interpreter.run("silu_mul_quant", x, spec, Config(4, split)), reference.silu_mul_quant(x, spec))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [128, 2304, 4096])
def test_every_size(k, dtype):
    for m in (0, 1, 9):
        check(awkward(m, 2 * k, dtype, strided=k == 2304), QuantSpec(layout="col_tma"), split=2 if k == 4096 else 1)


@pytest.mark.parametrize("name", [name for name in vars(specs) if name.isupper()])
def test_every_named_spec(name):
    check(awkward(9, 3072), getattr(specs, name))


@pytest.mark.parametrize("scale", ["fp32", "ue8m0", "ue8m0_packed"])
@pytest.mark.parametrize("group", [128, 64, 32])
def test_every_format(group, scale):
    check(awkward(9, 4608), QuantSpec(group=group, scale=scale, layout="col_tma"), split=3)


def test_the_reference_is_the_eager_model():
    x = activations(64, 4608)
    gate, up = x.chunk(2, -1)
    eager = reference.group_quant(F.silu(gate) * up, QuantSpec())
    fused = reference.silu_mul_quant(x, QuantSpec(rounding="twice"))
    # torch's own silu vectorizes exp differently; its last bit moves a bf16 rounding once in some ten thousand values
    assert (eager[0].float() != fused[0].float()).float().mean() <= 1e-5
