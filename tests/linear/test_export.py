"""torch.export with quantized activations: a layer, and a program that takes one and gives one."""

import io

import pytest
import torch
from shared.compare import assert_bitwise
from shared.inputs import activations

import normquant as nq
from normquant import BlockFP8Linear, QuantizedActivation, QuantSpec, quantize_weight


class Requantize(torch.nn.Module):
    """A quantized activation through a layer, and quantized again."""

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.spec = BlockFP8Linear(*quantize_weight(torch.randn(256, 384))), spec

    def forward(self, q: QuantizedActivation) -> tuple[QuantizedActivation, torch.Tensor]:
        out = self.layer(q)
        return nq.group_quant(out, spec=self.spec), out


@pytest.mark.parametrize("spec", [QuantSpec(), QuantSpec(scale="ue8m0", layout="col_tma")], ids=["fp32", "ue8m0"])
def test_a_quantized_activation_in_and_out(spec):
    model, q = Requantize(spec), nq.group_quant(activations(5, 384), spec=spec)
    exported = torch.export.export(model, (q,))
    other = nq.group_quant(activations(5, 384, seed=1), spec=spec)
    (got, out), (expected, out_expected) = exported.module()(other), model(other)
    assert isinstance(got, QuantizedActivation) and got.spec == spec
    assert_bitwise([got.data, got.scale, out], [expected.data, expected.scale, out_expected])


def test_a_saved_program():
    spec = QuantSpec()
    model, q = Requantize(spec), nq.group_quant(activations(5, 384))
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (q,)), file)
    file.seek(0)
    got, out = torch.export.load(file).module()(q)
    assert got.spec == spec
    assert_bitwise([got.data, got.scale, out], [model(q)[0].data, model(q)[0].scale, model(q)[1]])


def test_dynamic_rows():
    model, q = Requantize(QuantSpec()), nq.group_quant(activations(5, 384))
    rows = torch.export.Dim.DYNAMIC
    exported = torch.export.export(model, (q,), dynamic_shapes=([{0: rows}, {0: rows}],))
    for m in (5, 2, 17):
        other = nq.group_quant(activations(m, 384))
        assert_bitwise([exported.module()(other)[1]], [model(other)[1]])


def test_a_layer_exports():
    layer = BlockFP8Linear(*quantize_weight(torch.randn(256, 384)))
    x = activations(5, 384)
    assert_bitwise([torch.export.export(layer, (x,)).module()(x)], [layer(x)])
