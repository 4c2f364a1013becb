"""The block-FP8 linear layer as a module: its output, what callers ask of a Linear, conversions."""

import copy

import pytest
import torch
from shared.compare import assert_bitwise, bits
from shared.inputs import activations
from shared.linear_weights import SPECS, linear, weight_of
from torch.utils._python_dispatch import TorchDispatchMode

import normquant as nq
from normquant import BlockFP8Linear, block_fp8_linear, quantize_weight
from normquant.linear import dequantize_weight

BF16 = torch.bfloat16


@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (2, 0, 3), (1, 2, 3)])
def test_leading_dimensions(shape):
    weight, scale = quantize_weight(weight_of(300, 384))
    x = activations(int(torch.tensor(shape).prod()) if shape else 1, 384)
    layer = BlockFP8Linear(weight, scale)
    assert layer(x.view(*shape, 384)).shape == (*shape, 300)
    assert_bitwise([layer(x.view(*shape, 384)).view(-1, 300)], [layer(x)])
    q = nq.group_quant(x.view(*shape, 384), spec=layer.spec)
    assert_bitwise([block_fp8_linear(q, weight, scale).view(-1, 300)], [layer(x)])


class Scales(TorchDispatchMode):
    """The strides of the activation's scale in every call of the op."""

    def __init__(self) -> None:
        super().__init__()
        self.strides = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.normquant.block_fp8_linear.default:
            self.strides.append(args[1].stride())
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("m", [1, 2, 5])
def test_scales_reach_the_op_as_they_were_made(m):
    # also for one row, whose stride torch is free to change: with another one the GPU's GEMM needs a copy
    layer = BlockFP8Linear(*quantize_weight(weight_of(300, 384)))
    with Scales() as seen:
        layer(activations(m, 384))
        layer(nq.group_quant(activations(m, 384), spec=layer.spec))
    assert seen.strides == [layer.spec.scale_stride(m, 384)] * 2


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_from_linear_is_close_to_the_linear_layer(bias, dtype):
    stock = linear(bias, dtype)
    layer = BlockFP8Linear.from_linear(stock)
    x = activations(17, 384, dtype)
    out = layer(x)
    assert out.dtype == dtype and out.shape == (17, 300)
    # every factor is off by at most 1/16 of itself, half a step of three mantissa bits, or half the least step:
    # 2**-10 times its scale amax / 448
    xs, ws = x.float(), stock.weight.detach().float()
    x_off = xs.abs() / 16 + xs.abs().amax() / 448 * 2.0**-10
    w_off = ws.abs() / 16 + ws.abs().amax() / 448 * 2.0**-10
    bound = xs.abs() @ w_off.t() + x_off @ ws.abs().t() + x_off @ w_off.t()
    exact = torch.nn.functional.linear(xs, ws, stock.bias.detach().float() if bias else None)
    error = (out.float() - exact).abs()
    assert (error <= bound * 1.01 + 2.0**-7 * (exact.abs() + 1)).all()
    assert error.mean() < 0.05 * exact.abs().mean()
    assert not out.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bias_is_added_to_the_rounded_product(dtype):
    layer = BlockFP8Linear.from_linear(linear(True, dtype))
    x = activations(5, 384, dtype)
    without = BlockFP8Linear(layer.weight_fp8, layer.weight_scale)
    assert_bitwise([layer(x)], [without(x) + layer.bias])


def test_a_quantized_activation_is_not_quantized_again():
    layer = BlockFP8Linear.from_linear(linear(False))
    x = activations(5, 384)
    for spec in SPECS.values():
        q = nq.group_quant(x, spec=spec)
        assert_bitwise([layer(q)], [block_fp8_linear(q, layer.weight_fp8, layer.weight_scale)])
    assert_bitwise([layer(nq.group_quant(x, spec=layer.spec))], [layer(x)])


def test_a_copied_or_moved_layer_keeps_its_padding():
    layer = BlockFP8Linear.from_linear(linear(True))
    for other in (copy.deepcopy(layer), copy.deepcopy(layer).to("meta")):
        assert other.weight_scale.stride() == (4, 1)


def test_a_plain_tensor_as_bias_is_part_of_the_module():
    layer = BlockFP8Linear(*quantize_weight(weight_of(300, 384)), torch.ones(300, dtype=torch.bfloat16))
    assert "bias" in layer.state_dict()
    assert layer.to("meta").bias.is_meta


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_is_eager(backend):
    torch._dynamo.reset()
    layer = BlockFP8Linear.from_linear(linear(True)).requires_grad_(False)
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
    for m in (5, 2, 17):
        assert torch.equal(bits(compiled(activations(m, 384))), bits(layer(activations(m, 384))))


STRIDED = {
    "transposed": lambda: activations(384, 5).t(),
    "batch last": lambda: activations(10, 384).view(2, 5, 384).permute(1, 0, 2),
    "channels first": lambda: activations(2 * 384, 5).view(2, 384, 5).transpose(1, 2),
    "one row for all": lambda: activations(1, 384).expand(5, 384),
    "one value a row": lambda: activations(5, 1).expand(5, 384),
    "every other row": lambda: activations(10, 384)[::2],
    "every other column": lambda: activations(5, 768)[:, ::2],
    "a slice of heads": lambda: activations(10, 768).view(2, 5, 768)[:, 1:, :384],
    "no rows": lambda: activations(0, 384).view(2, 0, 384),
}


@pytest.mark.parametrize("name", STRIDED)
def test_any_strides(name):
    layer, x = BlockFP8Linear.from_linear(linear(True)), STRIDED[name]()
    assert_bitwise([layer(x)], [layer(x.contiguous())])
    assert layer(x).shape == (*x.shape[:-1], 300)


def test_strides_under_compile():
    torch._dynamo.reset()
    layer = BlockFP8Linear.from_linear(linear(True))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for name in ("transposed", "channels first", "one row for all"):
        x = STRIDED[name]()
        assert_bitwise([compiled(x)], [layer(x)])


def test_float32_activations_are_quantized_as_they_are():
    layer = BlockFP8Linear.from_linear(linear(True, torch.float32))
    x = activations(5, 384)  # bf16 values: the same numbers in either dtype
    out = layer(x.float())
    assert out.dtype == torch.float32
    product = block_fp8_linear(nq.group_quant(x), layer.weight_fp8, layer.weight_scale, out_dtype=torch.float32)
    assert_bitwise([out], [product + layer.bias])
    assert not torch.equal(layer(torch.randn(5, 384)), layer(torch.randn(5, 384)))


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(compiled):
    torch._dynamo.reset()
    layer = BlockFP8Linear.from_linear(linear(True, torch.float32))
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    x = torch.randn(5, 384)
    expected = layer(x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert_bitwise([run(x)], [expected])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_callers_ask_of_a_linear(dtype):
    layer = BlockFP8Linear.from_linear(linear(True, dtype).eval())
    assert isinstance(layer, torch.nn.Linear) and not layer.training
    assert (layer.in_features, layer.out_features) == (384, 300)
    assert (layer.weight.dtype, layer.weight.device, layer.weight.shape) == (dtype, torch.device("cpu"), (300, 384))
    assert repr(layer) == "BlockFP8Linear(in_features=384, out_features=300, bias=True)"
    x = torch.randn(5, 384).to(layer.weight.dtype)
    assert layer(x).dtype == dtype
    assert layer(nq.group_quant(activations(5, 384))).dtype == dtype
    expected = dequantize_weight(layer.weight_fp8, layer.weight_scale).to(dtype)
    assert_bitwise([torch.nn.functional.linear(x, layer.weight)], [x @ expected.t()])


class AsksForTheDtype(torch.nn.Module):
    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.layer = BlockFP8Linear.from_linear(linear(True, dtype))

    def forward(self, x):
        return self.layer(x.to(self.layer.weight.dtype)), x.to(self.layer.weight.dtype) @ self.layer.weight.t()


def test_the_weight_in_a_compiled_graph():
    torch._dynamo.reset()
    module, x = AsksForTheDtype(torch.float16), torch.randn(5, 384)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_bitwise(list(compiled(x)), list(module(x)))


def test_asking_for_the_dtype_leaves_nothing_in_a_compiled_graph():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    layer = BlockFP8Linear.from_linear(linear(False))
    compiled = torch.compile(
        lambda x: layer(x.to(layer.weight.dtype)),
        fullgraph=True,
        backend=torch._dynamo.backends.common.aot_autograd(fw_compiler=backend),
    )
    x = torch.randn(5, 384)
    assert_bitwise([compiled(x)], [layer(x.bfloat16())])
    assert not [node for graph in graphs for node in graph.graph.nodes if "repeat_interleave" in str(node.target)]
    assert [node for graph in graphs for node in graph.graph.nodes if "block_fp8_linear" in str(node.target)]


CONVERSIONS = {
    "to": (lambda m: m.to(torch.float16), torch.float16),
    "to like": (lambda m: m.to(torch.empty(1, dtype=torch.float16)), torch.float16),
    "half": (lambda m: m.half(), torch.float16),
    "float": (lambda m: m.float(), torch.float32),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "type": (lambda m: m.type(torch.float16), torch.float16),
    "meta and half": (lambda m: m.to("meta", torch.float16), torch.float16),
    "model": (lambda m: torch.nn.Sequential(m).half()[0], torch.float16),
    "there and back": (lambda m: m.half().bfloat16(), torch.bfloat16),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_conversion_leaves_the_fp8_weight_and_its_scales(name):
    convert, dtype = CONVERSIONS[name]
    layer = BlockFP8Linear.from_linear(linear(True))
    before = layer.weight_fp8.clone(), layer.weight_scale.clone()
    weight = layer.weight_fp8
    layer = convert(layer)
    assert layer.weight.dtype == dtype and layer.bias.dtype == dtype and layer.weight_scale.stride() == (4, 1)
    assert (layer.weight_fp8.dtype, layer.weight_scale.dtype) == (torch.float8_e4m3fn, torch.float32)
    if not layer.weight_fp8.is_meta:
        assert layer.weight_fp8 is weight
        assert_bitwise(
            [layer.weight_fp8.detach(), layer.weight_scale.contiguous()], [before[0], before[1].contiguous()]
        )
        assert layer(activations(5, 384).to(dtype)).dtype == dtype


def test_functional_call():
    layer, other = BlockFP8Linear.from_linear(linear(True)), BlockFP8Linear.from_linear(linear(True))
    changed = {"bias": other.bias + 1, "weight_fp8": (-other.weight_fp8.float()).to(torch.float8_e4m3fn)}
    x = activations(5, 384)
    out = torch.func.functional_call(layer, changed, (x,))
    expected = BlockFP8Linear(changed["weight_fp8"], other.weight_scale, changed["bias"])(x)
    assert_bitwise([out], [expected])
