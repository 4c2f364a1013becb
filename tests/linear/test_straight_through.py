"""The gradient of a block-FP8 linear layer: that of a Linear with its dequantized weight, eager and compiled."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from shared.inputs import activations
from shared.linear_weights import linear

from normquant import BlockFP8Linear
from normquant.compile import inductor_options
from normquant.linear import block_fp8_linear
from normquant.ops import group_quant

BF16 = torch.bfloat16


def layer_of(bias: bool = False, dtype: torch.dtype = BF16) -> BlockFP8Linear:
    return BlockFP8Linear.from_linear(linear(bias, dtype))


@pytest.fixture(autouse=True)
def no_warnings():
    """Torch warns where a gradient may be wrong."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*autograd kernel was not registered.*")
        yield


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(384,), (5, 384), (2, 3, 384), (0, 384)])
def test_the_gradient_is_that_of_the_dequantized_weight(shape, dtype):
    layer = layer_of(dtype=dtype)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    out = layer(x)
    with torch.no_grad():
        assert torch.equal(out, layer(x)), "the values are those without a gradient"
    grad = torch.randn_like(out)
    (given,) = torch.autograd.grad(out, x, grad)
    dense = layer.weight.dense().detach()
    (expected,) = torch.autograd.grad(F.linear(x, dense), x, grad)
    torch.testing.assert_close(given, expected, rtol=0, atol=0)
    assert given.dtype == dtype and (given.any() or not x.numel())


def test_a_bias_that_is_trained_has_its_gradient():
    layer = layer_of(bias=True)
    layer.bias.requires_grad_()
    for x in (activations(5, 384), activations(5, 384).requires_grad_()):
        layer.bias.grad = None
        layer(x).sum().backward()
        assert torch.equal(layer.bias.grad, torch.full_like(layer.bias, 5))


def test_strided_and_autocast_inputs():
    layer = layer_of()
    base = torch.randn(384, 5, dtype=BF16, requires_grad=True)
    layer(base.t()).sum().backward()
    expected = layer.weight.dense().sum(0, dtype=torch.float32)
    torch.testing.assert_close(base.grad.float(), expected[:, None].expand(384, 5), rtol=2e-2, atol=2e-2)
    wide = torch.randn(5, 384, requires_grad=True)
    with torch.autocast("cpu", dtype=BF16):
        layer(wide).sum().backward()
    assert wide.grad.dtype == torch.float32
    torch.testing.assert_close(wide.grad, expected.expand(5, 384), rtol=2e-2, atol=2e-2)


def test_gradients_of_gradients():
    layer = layer_of(dtype=torch.float32)
    x = torch.randn(3, 384, requires_grad=True)
    (first,) = torch.autograd.grad((layer(x) ** 2).sum() / 2, x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    dense = layer.weight.dense()
    torch.testing.assert_close(second, (dense.t() @ dense).sum(0).expand(3, -1), rtol=1e-3, atol=1e-3)


def test_a_product_that_would_lose_a_gradient_is_refused():
    layer, q = layer_of(), group_quant(activations(3, 384))
    layer.weight_fp8.requires_grad_()
    for call in (lambda: layer(activations(3, 384)), lambda: layer(q)):
        with pytest.raises(RuntimeError, match="block_fp8_linear has no gradient"):
            call()
    with torch.no_grad():
        layer(q)
    scale = layer.weight_scale.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="block_fp8_linear has no gradient"):
        block_fp8_linear(q, layer.weight_fp8.detach(), scale)
    args = q.data, q.scale, layer.weight_fp8.detach(), scale, BF16
    torch.library.opcheck(torch.ops.normquant.block_fp8_linear, args, test_utils="test_autograd_registration")


@pytest.mark.parametrize("policy", ["always", "native", "never"])
def test_a_compiled_block_trains_as_eager_does(policy):
    """A residual path beside the norm and the layer: what a lost gradient would leave is not zero, but wrong."""
    norm, layer = torch.nn.RMSNorm(384, dtype=BF16), BlockFP8Linear.from_linear(torch.nn.Linear(384, 384, dtype=BF16))
    torch.nn.init.normal_(norm.weight, 1.0)

    def block(x):
        return x + layer(norm(x))

    def gradients(fn):
        norm.weight.grad = None
        x = activations(8, 384).requires_grad_()
        (fn(x).float() * torch.linspace(0, 1, 384)).sum().backward()
        return x.grad, norm.weight.grad

    compiled = torch.compile(block, options=inductor_options(policy, strict=True), fullgraph=True)
    for given, expected in zip(gradients(compiled), gradients(block), strict=True):
        torch.testing.assert_close(given, expected, rtol=2e-2, atol=2e-2)
    dense = layer.weight.dense().detach()
    straight = gradients(lambda x: x + F.linear(norm(x), dense))
    for given, expected in zip(gradients(block), straight, strict=True):
        torch.testing.assert_close(given, expected, rtol=2e-2, atol=2e-2)
