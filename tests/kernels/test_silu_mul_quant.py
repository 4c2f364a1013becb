"""The gated-product kernel, interpreted on CPU, against the reference: equal to the bit."""

import pytest
import torch
import torch.nn.functional as F
from shared import interpreter
from shared.compare import assert_bitwise
from shared.inputs import activations, awkward

from normquant import QuantSpec, reference, specs
from normquant.kernels.configs import Config


def check(x, spec, split=1, limit=None):
    config, expected = Config(4, split), reference.silu_mul_quant(x, spec, limit)
    assert_bitwise(interpreter.run("silu_mul_quant", x, spec, config, limit, return_product=True), expected)
    assert_bitwise(interpreter.run("silu_mul_quant", x, spec, config, limit), (*expected[:2], None))


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


@pytest.mark.parametrize("limit", [0.01, 7.3, 10.0, 3e4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_limits(dtype, limit):
    # 0.01 and 7.3 are no values of these dtypes; awkward rows have NaN, inf and values far beyond each limit
    for spec in (QuantSpec(layout="col_tma"), specs.HF, specs.VLLM_UE8M0):
        check(awkward(9, 1536, dtype, strided=True) * 4, spec, limit=limit)


def test_a_limit_is_that_of_torch_clamp():
    x = awkward(9, 1024) * 4
    gate, up = x.chunk(2, -1)
    clamped = torch.cat([gate.clamp(max=7.3), up.clamp(-7.3, 7.3)], 1)
    spec = QuantSpec(rounding="twice")
    assert_bitwise(reference.silu_mul_quant(x, spec, 7.3), reference.silu_mul_quant(clamped, spec))
    nan = torch.full_like(x, float("nan"))
    for made in interpreter.run("silu_mul_quant", nan, spec, None, 7.3, return_product=True):
        assert made.float().isnan().all()


def test_the_reference_is_the_eager_model():
    x = activations(64, 4608)
    gate, up = x.chunk(2, -1)
    product = F.silu(gate) * up
    eager = *reference.group_quant(product, QuantSpec()), product
    fused = reference.silu_mul_quant(x, QuantSpec(rounding="twice"))
    # torch's own silu vectorizes exp differently; its last bit moves a bf16 rounding once in some ten thousand values
    for at in (0, 2):
        assert (eager[at].float() != fused[at].float()).float().mean() <= 1e-5
