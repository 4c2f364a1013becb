"""Each step between amax and the scale: read with its own constants, or rejected with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from shared.quick_graphs import graph_of
from torch._subclasses.fake_tensor import FakeTensorMode

from normquant.compile.find.duplicates import Values
from normquant.compile.find.graph import FP8_DTYPES, NotFound, Unsupported, dtype, is_cast, is_view, peel
from normquant.compile.find.quants import Arithmetic, complete, read_arithmetic
from normquant.compile.find.scale_arithmetic import bounds_of, read_scale
from normquant.spec import QuantSpec

M, K, GROUP = 5, 512, 128
FP8, BF16, FP32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32
INF = float("inf")
Step = Callable[..., torch.Tensor]


def by_scale(g, s, a):
    return g / s


def by_reciprocal(g, s, a):
    return g * (1.0 / s)


def quantize(scale: Step, divide: Step = by_scale, amax: Step = lambda g: g.abs().amax(-1, keepdim=True)) -> Step:
    """y -> data and scale; `scale` makes a scale of the amax, `divide` the values of both."""

    def quant(y):
        g = y.view(M, -1, GROUP).float()
        a = amax(g)
        s = scale(a)
        return divide(g, s, a).clamp(-448, 448).to(FP8).view(y.shape), s

    return quant


def read(quant: Step, y: torch.Tensor | None = None) -> Arithmetic:
    graph = graph_of(quant, torch.zeros(M, K, dtype=BF16) if y is None else y).graph
    (cast,) = [node for node in graph.nodes if is_cast(node) and dtype(node) in FP8_DTYPES]
    return read_arithmetic(cast, Values(graph))


def up_by_bits(s, add=0x7FFFFF, mask=0x7F800000):
    return ((s.view(torch.int32) + add) & mask).view(FP32)


def up_by_values(s):
    """Conversions where `up_by_bits` reads the same bits as another dtype."""
    return ((s.view(torch.int32) + 0x7FFFFF) & 0x7F800000).to(FP32)


def up_from_values(s):
    return ((s.to(torch.int32) + 0x7FFFFF) & 0x7F800000).view(FP32)


def up_by_log2(s, power=torch.exp2):
    return power(torch.ceil(torch.log2(s)))


def floored(a):
    return a.clamp(min=1e-4)


READ: dict[str, tuple[Step, dict[str, Any]]] = {
    "amax / 448": (lambda a: a / 448.0, {}),
    "amax floor": (lambda a: a.clamp(min=1e-4) / 448.0, {"floor": 1e-4}),
    "maximum": (lambda a: torch.maximum(a, torch.full((), 1e-4)) / 448.0, {"floor": 1e-4}),
    "scale floor": (lambda a: (a / 448.0).clamp(min=1e-5), {"scale_floor": 1e-5}),
    "both floors": (lambda a: (a.clamp_min(1e-4) / 448.0).clamp_min(1e-5), {"floor": 1e-4, "scale_floor": 1e-5}),
    "abs": (lambda a: (a / 448.0).abs(), {}),
    "divide": (lambda a: a / torch.full((), 448.0), {"scale_by": "divide"}),
    "multiply": (lambda a: a * (1.0 / 448.0), {"scale_by": "multiply"}),
    "multiplied": (lambda a: (1.0 / 448.0) * a, {"scale_by": "multiply"}),
    "tensor first": (lambda a: torch.full((), 1.0 / 448.0) * a, {"scale_by": "multiply"}),
    "exp2": (lambda a: up_by_log2(a.clamp(min=1e-4) / 448.0), {"floor": 1e-4, "ue8m0": True, "by_log2": True}),
    "pow": (lambda a: up_by_log2(a / 448.0, lambda e: torch.pow(2.0, e)), {"ue8m0": True, "by_log2": True}),
    "bits": (lambda a: up_by_bits(a / 448.0), {"ue8m0": True}),
    "bits of a floor": (lambda a: up_by_bits((a / 448.0).clamp(min=1e-5)), {"ue8m0": True, "scale_floor": 1e-5}),
    "bits of a finite": (lambda a: finite_bits(a / 448.0, lambda s: s.abs() < INF), {"ue8m0": True}),
    "bits of isfinite": (lambda a: finite_bits(a / 448.0, torch.isfinite), {"ue8m0": True}),
    "bits of x == x": (lambda a: finite_bits(a / 448.0, lambda s: (s == s) & (s.abs() != INF)), {"ue8m0": True}),
    "bits of both": (lambda a: finite_bits(a / 448.0, both), {"ue8m0": True}),
}


def both(s):
    return torch.logical_and(s == s, s.abs() != INF)


def finite_bits(s, finite):
    return torch.where(finite(s), up_by_bits(s), s)


@pytest.mark.parametrize("name", READ)
def test_arithmetic_that_is_read(name: str) -> None:
    scale, fields = READ[name]
    for divide, how in ((by_scale, "scale"), (by_reciprocal, "reciprocal")):
        found = read(quantize(scale, divide))
        expected = {"floor": 0.0, "scale_floor": 0.0, "scale_by": "scalar", "ue8m0": False, "by_log2": False} | fields
        assert {field: getattr(found.facts, field) for field in expected} == expected
        assert (found.divide, found.group, found.y.op) == (how, GROUP, "placeholder")
        assert found.reduced is found.y and "amax" in str(found.facts.amax.target)
        _, scale_read = found.cast.graph.output_node().args[0]
        assert found.scale is peel(scale_read, is_view)


AMAX: dict[str, Step] = {
    "no keepdim": lambda g: g.abs().amax(-1).unsqueeze(-1),
    "max": lambda g: g.abs().max(-1, keepdim=True).values,
    "max without keepdim": lambda g: g.abs().max(-1).values.unsqueeze(-1),
}


@pytest.mark.parametrize("name", AMAX)
def test_an_amax_in_other_words(name: str) -> None:
    found = read(quantize(lambda a: floored(a) / 448.0, amax=AMAX[name]))
    assert complete(found, K).spec == QuantSpec(floor=1e-4) and found.group == GROUP


def in_bf16(floor: Step) -> Step:
    def quant(y):
        g = y.view(M, -1, GROUP)
        s = floor(g.abs().amax(-1, keepdim=True)).float() / 448.0
        return (g.float() / s).to(FP8).view(y.shape), s

    return quant


def test_a_floor_in_bf16_is_a_bf16_number() -> None:
    found = read(in_bf16(lambda a: torch.maximum(a, torch.full((), 1e-4, dtype=BF16))))
    assert found.facts.floor == float(torch.tensor(1e-4, dtype=BF16)) != 1e-4


def test_a_gpu_divides_by_a_number_of_the_host_as_by_a_python_number() -> None:
    """By a tensor of its own it divides truly."""
    with FakeTensorMode():
        y = torch.zeros(M, K, dtype=BF16, device="cuda")
        cases = {"scalar": lambda a: a / torch.full((), 448.0), "divide": lambda a: a / torch.full_like(a, 448.0)}
        for expected, scale in cases.items():
            assert read(quantize(scale), y).facts.scale_by == expected


def by_amax(factor: float) -> Step:
    return lambda g, s, a: g * (factor / a)


def floored_amax(g):
    return floored(g.abs().amax(-1, keepdim=True))


def test_data_that_is_divided_by_the_amax() -> None:
    for scale in (lambda a: a / 448.0, lambda a: a.squeeze(-1) / 448.0, lambda a: ((a * 2.0) * (a * a), a / 448.0)[1]):
        found = read(quantize(scale, by_amax(448.0), floored_amax))
        assert (found.divide, found.facts.floor, found.facts.scale_by) == ("amax", 1e-4, "scalar")


@pytest.mark.parametrize(
    ("divide", "how"),
    [
        (lambda g, s, a: g * (1.0 / s.expand(-1, -1, GROUP)), "reciprocal"),
        (lambda g, s, a: g * (448.0 / a.expand(-1, -1, GROUP)), "amax"),
        (lambda g, s, a: g * (448.0 / a.squeeze(-1)).unsqueeze(-1), "amax"),
    ],
    ids=["1 / s", "448 / amax", "448 / amax without its dimension"],
)
def test_what_is_inverted_may_have_the_shape_of_the_values_or_of_the_groups(divide: Step, how: str) -> None:
    found = read(quantize(lambda a: a / 448.0, divide, floored_amax))
    assert (found.divide, found.facts.scale_by, found.scale.target) == (how, "scalar", torch.ops.aten.div.Tensor)


def test_an_amax_that_is_scaled_for_others_too() -> None:
    def quant(y):
        g = y.view(M, -1, GROUP).float()
        a = floored_amax(g)
        return a * 2.0, (g * (448.0 / a)).to(FP8).view(y.shape), a / 448.0

    assert read(quant).divide == "amax"


def test_the_default_dtype_changes_no_factor() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        assert read(quantize(lambda a: a * (1.0 / 448.0))).facts.scale_by == "multiply"
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("bounds", "read_as"),
    [({"min": 1e-5}, (1e-5, None)), ({"max": 2.0}, (None, 2.0)), ({"min": 1e-5, "max": 2.0}, (1e-5, 2.0))],
    ids=str,
)
def test_a_clamp_that_was_not_decomposed(bounds: dict[str, float], read_as: tuple) -> None:
    quant = quantize(lambda a: torch.clamp(a / 448.0, **bounds))
    graph = graph_of(quant, torch.zeros(M, K, dtype=BF16), decompose=False).graph
    clamp = next(node for node in graph.nodes if "clamp" in str(node.target))
    assert bounds_of(clamp) == read_as
    if "max" not in bounds:
        assert read_scale(clamp, "scale")[1].scale_floor == 1e-5
    else:
        with pytest.raises(Unsupported, match=r"^the scale has an upper bound; the kernels support none$"):
            read_scale(clamp, "scale")


def test_a_bound_that_is_computed_is_not_taken_for_none() -> None:
    def fn(s, low, high):
        return s.clamp(low, high), s.clamp(min=low), s.clamp(max=high), s.clamp(torch.full((), 1e-5), high)

    def clamps(fn, *args, decompose):
        graph = graph_of(fn, *args, decompose=decompose).graph
        return [bounds_of(node) for node in graph.nodes if "clamp" in str(node.target)]

    s, low, high = torch.zeros(3, M)
    assert clamps(fn, s, low, high, decompose=False) == [None] * 4
    assert clamps(fn, s, low, high, decompose=True) == [None] * 4 + [(1e-5, None), None]
    assert clamps(lambda s: s.clamp(max=torch.full((), 2.0)), s, decompose=False) == [(None, 2.0)]


def below_2(s):
    return s.abs() < 2.0


def a_number(s):
    return s == s


def another_number(s):
    return (s == s + 0.0) & (s.abs() != INF)


def no_number(s):
    return (s != s) & (s.abs() != INF)


def a_number_and_not_1(s):
    return (s == s) & (s.abs() != 1.0)


def a_number_and_another_finite(s):
    return (s == s) & ((s + 0.0).abs() != INF)


CONDITIONS = below_2, a_number, another_number, no_number, a_number_and_not_1, a_number_and_another_finite
WHERE = "the scale passes through aten.where; the kernels support amax / 448 with floors"
POWER = "a scale is changed after it was rounded to a power of two"
REJECTED: dict[str, tuple[Step, str]] = {
    "the whole tensor's": (
        quantize(lambda a: a / 448.0, amax=lambda g: g.abs().amax()),
        "the scale is one of the whole tensor or of several dimensions; the kernels support one per group",
    ),
    "no division": (quantize(floored), "the scale is not amax / 448"),
    "240": (quantize(lambda a: a / 240.0), "the scale is amax / 240.0; the kernels divide by 448"),
    "times 2": (quantize(lambda a: a * 2.0), "the scale is amax * 2.0; the kernels divide by 448"),
    "twice": (quantize(lambda a: a / 448.0 / 448.0), "the amax is scaled twice"),
    "max": (quantize(lambda a: (a / 448.0).clamp(max=2.0)), "the scale has an upper bound; the kernels support none"),
    "minimum": (
        quantize(lambda a: torch.minimum(a / 448.0, torch.full((), 2.0))),
        "the scale has an upper bound; the kernels support none",
    ),
    "clamp": (
        quantize(lambda a: (a / 448.0).clamp(1e-5, 2.0)),
        "the scale has an upper bound; the kernels support none",
    ),
    "floors": (quantize(lambda a: a.clamp(min=1e-4).clamp(min=1e-3) / 448.0), "the amax or the scale is clamped twice"),
    "scale floors": (
        quantize(lambda a: (a / 448.0).clamp(min=1e-5).clamp(min=1e-4)),
        "the amax or the scale is clamped twice",
    ),
    "plus": (
        quantize(lambda a: a / 448.0 + 1e-6),
        "the scale passes through aten.add; the kernels support amax / 448 with floors",
    ),
    "minus": (
        quantize(lambda a: a / 448.0 - torch.full((), 1e-6)),
        "the scale passes through aten.sub; the kernels support amax / 448 with floors",
    ),
    "where": (
        quantize(lambda a: torch.where(a == 0, 1.0, a / 448.0)),
        WHERE,
    ),
    "other bits": (
        quantize(lambda a: up_by_bits(a / 448.0, add=0)),
        "the scale passes through aten.view; the kernels support amax / 448 with floors",
    ),
    "other mask": (
        quantize(lambda a: up_by_bits(a / 448.0, mask=0x7F000000)),
        "the scale passes through aten.view; the kernels support amax / 448 with floors",
    ),
    **{
        f"bits where {condition.__name__}": (quantize(lambda a, c=condition: finite_bits(a / 448.0, c)), WHERE)
        for condition in CONDITIONS
    },
    "converted from float": (
        quantize(lambda a: up_from_values(a / 448.0)),
        "the scale passes through aten.view; the kernels support amax / 448 with floors",
    ),
    "condition on another": (
        quantize(lambda a: torch.where((a / 448.0).abs() < INF, up_by_bits(a / 448.0), a)),
        WHERE,
    ),
    "floor": (
        quantize(lambda a: torch.exp2(torch.floor(torch.log2(a / 448.0)))),
        "the scale is a power of two by aten.floor; the kernels support 2 ** ceil(log2(s))",
    ),
    "ceil of log": (
        quantize(lambda a: torch.exp2(torch.ceil(torch.log(a / 448.0)))),
        "the scale is a power of two by aten.ceil; the kernels support 2 ** ceil(log2(s))",
    ),
    "power before": (quantize(lambda a: up_by_bits(a) / 448.0), POWER),
    "power and floor": (quantize(lambda a: up_by_bits(a / 448.0).clamp(min=1e-5)), POWER),
    "power of a power": (quantize(lambda a: up_by_log2(up_by_bits(a / 448.0))), POWER),
    "a bf16 clamp": (in_bf16(floored), "the scale is computed in bfloat16, not in float32"),
    "in bf16": (quantize(lambda a: (a.to(BF16) / 448.0).float()), "the scale is computed in bfloat16, not in float32"),
    "448 / amax alone": (
        quantize(lambda a: a, by_amax(448.0), floored_amax),
        "the data is y * (448 / amax), and nothing in the graph holds amax / 448",
    ),
    "448 / amax of another floor": (
        quantize(lambda a: a.clamp(min=1e-3) / 448.0, by_amax(448.0), floored_amax),
        "the data is y * (448 / amax), and nothing in the graph holds amax / 448",
    ),
    "224 / amax": (
        quantize(lambda a: a / 448.0, by_amax(224.0), floored_amax),
        "the data is y * (224.0 * (1 / x)); the kernels support 1 and 448 for the factor",
    ),
}


@pytest.mark.parametrize("name", REJECTED)
def test_arithmetic_that_is_rejected(name: str) -> None:
    quant, reason = REJECTED[name]
    with pytest.raises(Unsupported) as raised:
        read(quant)
    assert str(raised.value) == reason


def by_true_reciprocal(g, s, a):
    return g * (torch.full((), 1.0) / s)


def by_expanded(g, s, a):
    return g / s.expand(-1, -1, GROUP)


@pytest.mark.parametrize(("divide", "how"), [(by_true_reciprocal, "reciprocal"), (by_expanded, "scale")])
def test_a_scale_that_the_values_meet_in_other_words(divide: Step, how: str) -> None:
    found = read(quantize(lambda a: floored(a) / 448.0, divide))
    assert (found.divide, complete(found, K).spec) == (how, QuantSpec(floor=1e-4, divide=how))


NOT_FOUND: dict[str, tuple[Step, str]] = {
    "bits converted to float": (
        quantize(lambda a: up_by_values(a / 448.0)),
        "its scale comes from prims.convert_element_type (convert_element_type_1); expected the amax of each group",
    ),
    "mean": (
        quantize(lambda a: a / 448.0, amax=lambda g: g.mean(-1, keepdim=True)),
        "its scale comes from aten.mean (mean); expected the amax of each group",
    ),
    "a tensor's amax": (
        quantize(lambda a: a * a),
        "its scale comes from aten.mul (mul); expected the amax of each group",
    ),
    "no tensor": (
        lambda y: (y.float() * 2).to(FP8),
        "its data comes from aten.mul; expected a division by the scale of each group",
    ),
    "no division": (
        lambda y: y.float().neg().to(FP8),
        "its data comes from aten.neg; expected a division by the scale of each group",
    ),
    "a constant": (
        lambda y: (y.float() / torch.full((), 0.5)).to(FP8),
        "its scale comes from aten.full (full); expected the amax of each group",
    ),
}


@pytest.mark.parametrize("name", NOT_FOUND)
def test_what_is_no_group_quantization(name: str) -> None:
    quant, reason = NOT_FOUND[name]
    with pytest.raises(NotFound) as raised:
        read(quant)
    assert str(raised.value) == reason


def completed(scale: Step, y: torch.Tensor | None = None) -> QuantSpec:
    return complete(read(quantize(scale), y), K).spec


def test_log2_is_exact_but_for_an_unrounded_norm_and_a_floor_just_above_a_power_of_two() -> None:
    rounded = completed(lambda a: up_by_log2(floored(a) / 448.0))
    assert rounded == QuantSpec(scale="ue8m0", floor=1e-4)
    assert completed(lambda a: up_by_log2((a / 448.0).clamp(min=2.0**-20))).scale_floor == 2.0**-20
    assert completed(lambda a: up_by_log2((a / 448.0).clamp(min=2.0**-20 * 1.01))).is_ue8m0
    unrounded = torch.zeros(M, K, dtype=FP32)
    with pytest.raises(Unsupported, match=r"^ue8m0 scales by log2 of a norm that was not rounded: .* log2 does not$"):
        completed(lambda a: up_by_log2(floored(a) / 448.0), unrounded)
    assert completed(lambda a: up_by_bits(floored(a) / 448.0), unrounded).is_ue8m0
    above = 2.0**-19 * (1 + 2.0**-16)
    with pytest.raises(Unsupported, match="floor is 0"):
        completed(lambda a: up_by_log2(a / 448.0))
    for scale in (lambda a: (a / 448.0).clamp(min=above), lambda a: a.clamp(min=above * 448.0) / 448.0):
        with pytest.raises(Unsupported, match=r"^ue8m0 scales by log2 with the smallest scale .*, just above a power"):
            completed(lambda a, scale=scale: up_by_log2(scale(a)))
        assert completed(lambda a, scale=scale: up_by_bits(scale(a))).is_ue8m0
