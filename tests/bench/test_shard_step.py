"""A decode step on a CPU: what it computes, and which products and ops a layer of DeepSeek-R1 has."""

from __future__ import annotations

import torch
from shared import interpreter
from shared.decode_shards import TINY
from torch._subclasses.fake_tensor import FakeTensorMode

from normquant import reference
from normquant.bench import shard_step
from normquant.bench.cases import ADD_NORM, LATENTS, QUANT, ROPE, SILU
from normquant.bench.shard_step import DEEPSEEK_R1, SPEC, DecodeStep, Layer, StepInputs, followed
from normquant.linear import dequantized_linear
from normquant.ops import OPS


def multiply(data, scale, weight, by):
    return dequantized_linear(data, scale, weight, by, torch.bfloat16)


def by_hand(layer: Layer, inputs: StepInputs, data, scale, residual):
    """A layer of the tiny shard in the reference's functions."""

    def product(quantized, linear):
        return multiply(*quantized[:2], linear.weight, linear.scale)

    latent = product((data, scale), layer.qkv_a)
    normed = reference.rms_norm_quant(latent[:, :128], layer.q_norm, 1e-6, SPEC)
    q_nope = product(normed, layer.q_b).view(3, 2, 80)[..., :64]  # [3, 2, 64]; the turned values are not used
    absorbed = torch.bmm(torch.bmm(q_nope.transpose(0, 1), layer.w_uk), layer.w_uv)  # [2, 3, 64]
    heads = torch.cat(absorbed.unbind(0), 1)  # [3, 128]
    x = product(reference.group_quant(heads, SPEC), layer.o)
    *quantized, residual, _ = reference.add_rms_norm_quant(x, residual, layer.mlp_norm, 1e-6, SPEC)
    gated = reference.silu_mul_quant(product(quantized, layer.gate_up), SPEC)
    x = product(gated, layer.down)
    return reference.add_rms_norm_quant(x, residual, layer.next_norm, 1e-6, SPEC)[:3]


def test_a_step_of_interpreted_kernels_is_that_of_the_reference():
    def call(op, *args):
        return interpreter.run_op(SPEC, op, *args)

    layers, inputs = shard_step.layers(TINY, 2, device="cpu"), shard_step.inputs(TINY, 3, "cpu")
    got = shard_step.run(DecodeStep(TINY, layers, call, followed(multiply, call)), inputs)
    expected = inputs.data, inputs.scale, inputs.residual
    for layer in layers:
        expected = by_hand(layer, inputs, *expected)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.shape == theirs.shape and ours.float().isfinite().all()
        assert torch.equal(ours.float(), theirs.float())
    assert got[2].shape == (3, TINY.hidden) and got[2].std() > inputs.residual.std() + 0.1


def test_each_layer_is_that_of_a_shard_of_deepseek_r1():
    seen: list = []

    def call(op, x, *args):
        seen.append((op, tuple(x.shape)))
        outputs = OPS[op].reference(x, *args, SPEC)
        return (outputs,) if isinstance(outputs, torch.Tensor) else outputs

    def seen_product(data, scale, weight, by):
        (m, k), (n, _) = data.shape, weight.shape
        assert scale.shape == (m, k // 128) and by.shape == (-(-n // 128), k // 128) and by.is_contiguous()
        seen.append(("product", (n, k)))
        return multiply(data, scale, weight, by)

    with FakeTensorMode():
        layers = shard_step.layers(DEEPSEEK_R1, 2, device="cpu")
        step = DecodeStep(DEEPSEEK_R1, layers, call, followed(seen_product, call))
        data, scale, residual = shard_step.run(step, shard_step.inputs(DEEPSEEK_R1, 5, "cpu"))
    assert data.shape == residual.shape == (5, 7168) and scale.shape == (5, 56)
    layer = [
        ("product", (2112, 7168)),
        (LATENTS, (5, 2112)),
        ("product", (3072, 1536)),
        (ROPE, (5, 3072)),
        (QUANT, (5, 2048)),
        ("product", (7168, 2048)),
        (ADD_NORM, (5, 7168)),
        ("product", (4608, 7168)),
        (SILU, (5, 4608)),
        ("product", (7168, 2304)),
        (ADD_NORM, (5, 7168)),
    ]
    assert seen == 2 * layer


def test_what_products_want_done_to_scales_is_done():
    (layer,) = shard_step.layers(TINY, 1, lambda scale: scale.t().contiguous(), "cpu")
    assert layer.gate_up.weight.shape == (256, 256) and layer.down.scale.shape == (1, 2)
