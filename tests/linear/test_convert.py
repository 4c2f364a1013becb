"""Which linear layers of a model become block-FP8, which stay, and what the report says of them."""

import copy

import pytest
import torch
from shared.compare import assert_bitwise
from shared.inputs import activations
from torch import nn

import normquant as nq
from normquant import BlockFP8Linear
from normquant.linear import SKIP, ConversionReport, convert_linears

BF16 = torch.bfloat16


def linear(k: int = 256, n: int = 256, **kwargs) -> nn.Linear:
    return nn.Linear(k, n, **{"dtype": BF16} | kwargs)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = linear()
        self.gate = linear(256, 4)
        self.router = nn.ModuleDict({"classifier": linear(256, 4)})
        self.norm = nn.LayerNorm(256, dtype=BF16)

    def forward(self, x):
        return self.norm(self.proj(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.lm_head = linear(256, 512)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Named(nn.Linear):
    """Nothing but a name."""


def test_a_model():
    model = Model()
    plain = copy.deepcopy(model)
    out, report = convert_linears(model)
    assert out is model
    assert report.converted == ("layers.0.proj", "layers.1.proj")
    assert set(report.left) == {
        "lm_head",
        *(f"layers.{i}.{name}" for i in range(2) for name in ("gate", "router.classifier")),
    }
    assert isinstance(model.layers[0].proj, BlockFP8Linear) and type(model.lm_head) is nn.Linear
    x = activations(5, 256)
    assert_bitwise([model.layers[0].proj(x)], [BlockFP8Linear.from_linear(plain.layers[0].proj)(x)])
    assert (model(x).float() - plain(x).float()).norm() < 0.2 * plain(x).float().norm()


def test_block_fp8_returns_the_model():
    model = Model()
    assert nq.block_fp8(model) is model and isinstance(model.layers[1].proj, BlockFP8Linear)


@pytest.mark.parametrize(
    ("skip", "converted"),
    [
        ((), {"proj", "gate", "router.classifier", "lm_head"}),
        (SKIP, {"proj"}),
        (("*lm_head",), {"proj", "gate", "router.classifier"}),
        (("*.gate",), {"proj", "router.classifier", "lm_head"}),
        (("layers.*",), {"lm_head"}),
        (("layers.0.*", "classifier"), {"proj", "gate", "lm_head"}),
    ],
)
def test_skip(skip, converted):
    _, report = convert_linears(Model(), skip=skip)
    assert {name.split(".", 2)[-1] if name.startswith("layers") else name for name in report.converted} == converted
    assert all("skip has the pattern" in reason for reason in report.left.values())


def hooked() -> nn.Linear:
    layer = linear()
    layer.register_forward_hook(lambda module, args, out: out * 2)
    return layer


def patched() -> nn.Linear:
    layer = linear()
    layer.forward = lambda x: x
    return layer


def parametrized() -> nn.Linear:
    return nn.utils.parametrizations.weight_norm(linear(dtype=torch.float32))


LEFT = {
    "own forward": (lambda: Scaled(256, 256), "Scaled has a forward of its own"),
    "patched forward": (patched, "Linear has a forward of its own"),
    "hooks": (hooked, "hooks"),
    "old weight norm": (lambda: nn.utils.weight_norm(linear(dtype=torch.float32)), "hooks"),
    "parametrized": (parametrized, "parametrized"),
    "K = 192": (lambda: linear(192), "multiple of 128"),
    "K = 0": (lambda: linear(0), "multiple of 128"),
    "N = 0": (lambda: linear(256, 0), "[0, 256]"),
    "lazy": (lambda: nn.LazyLinear(256), "hooks"),
    "float64": (lambda: linear(dtype=torch.float64), "torch.float64"),
    "complex": (lambda: linear(dtype=torch.complex64), "torch.complex64"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning", "ignore:.*weight_norm.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors", "ignore:.*zero-element.*")
@pytest.mark.parametrize("name", LEFT)
def test_what_stays(name):
    make, reason = LEFT[name]
    layer = make()
    model, report = convert_linears(nn.Sequential(layer, linear()))
    assert model[0] is layer and isinstance(model[1], BlockFP8Linear)
    assert report.converted == ("1",) and reason in report.left["0"]
    assert convert_linears(layer)[0] is layer  # the same for a module that is such a layer


def test_a_subclass_without_a_forward_of_its_own_is_converted():
    model, report = convert_linears(nn.Sequential(Named(256, 256)))
    assert isinstance(model[0], BlockFP8Linear) and report == ConversionReport(("0",), {})


def test_modules_that_read_their_weights_without_a_call():
    model = nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(256, 2, dtype=BF16),
            "encoder": nn.TransformerEncoder(nn.TransformerEncoderLayer(256, 2, 512, dtype=BF16), 1),
            "decoder": nn.TransformerDecoderLayer(256, 2, 512, dtype=BF16),
        }
    ).eval()
    x = activations(6, 256).view(3, 2, 256)
    before = model.attention(x, x, x)[0], model.encoder(x)
    _, report = convert_linears(model)
    assert report.converted == ("decoder.linear1", "decoder.linear2")
    assert report.left["attention.out_proj"].startswith("nn.MultiheadAttention reads")
    assert report.left["encoder.layers.0.linear1"].startswith("nn.TransformerEncoderLayer reads")
    assert len(report.left) == 6
    assert_bitwise([model.attention(x, x, x)[0], model.encoder(x)], before)
    assert model.decoder(x, x).shape == x.shape


def test_one_module_under_two_names_stays_one():
    shared = linear()
    model = nn.ModuleDict({"a": shared, "inner": nn.ModuleDict({"b": shared, "c": shared})})
    _, report = convert_linears(model)
    assert isinstance(model["a"], BlockFP8Linear)
    assert model["a"] is model["inner"]["b"] is model["inner"]["c"]
    assert report == ConversionReport(("a",), {})


def test_tied_weights_stay_tied():
    model = nn.ModuleDict({"embed": nn.Embedding(256, 256, dtype=BF16), "head": linear(bias=False), "other": linear()})
    model["head"].weight = model["embed"].weight
    model["twin"] = linear(bias=False)
    model["again"] = linear(bias=False)
    model["again"].weight = model["twin"].weight
    _, report = convert_linears(model)
    assert report.converted == ("other",)
    assert report.left == {
        "head": "its weight is tied to that of embed",
        "twin": "its weight is tied to that of again",
        "again": "its weight is tied to that of twin",
    }
    assert model["head"].weight is model["embed"].weight and model["again"].weight is model["twin"].weight


def test_a_linear_layer_itself():
    layer = linear()
    out, report = convert_linears(layer)
    assert isinstance(out, BlockFP8Linear) and report == ConversionReport(("",), {})
    assert_bitwise([out(activations(5, 256))], [BlockFP8Linear.from_linear(layer)(activations(5, 256))])
    assert isinstance(nq.block_fp8(layer), BlockFP8Linear)


def test_twice_is_once():
    model = Model()
    _, report = convert_linears(model)
    layers = [layer.proj for layer in model.layers]
    _, again = convert_linears(model)
    assert [layer.proj for layer in model.layers] == layers and again == report


def test_the_report_as_text():
    _, report = convert_linears(nn.ModuleDict({"a": linear(), "b": linear(192)}))
    assert str(report) == (
        "1 linear layers are block-FP8, 1 are not\n  b: its weight is [256, 192]; K must be a positive multiple of 128"
    )
    assert "the module itself" in str(convert_linears(linear(192))[1])


def test_a_model_on_the_meta_device():
    with torch.device("meta"):
        model = nq.block_fp8(Model())
    assert model.layers[0].proj.weight_fp8.is_meta
    source = nq.block_fp8(Model())
    model.load_state_dict(source.state_dict(), assign=True)
    assert_bitwise([model(activations(5, 256))], [source(activations(5, 256))])


def test_the_activation_spec_is_passed_on():
    spec = nq.QuantSpec(scale="ue8m0")
    model = nq.block_fp8(Model(), spec)
    assert model.layers[0].proj.spec == spec
