"""Every spelling of the group quantization: recognised with its own constants, or rejected with the reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from shared.pass_harness import assert_same, exact, run_with_pass
from shared.quick_graphs import graph_of
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

import normquant as nq
from normquant.compile.find.axes import Axes, order
from normquant.compile.find.duplicates import Values
from normquant.compile.find.graph import FP8_DTYPES, NotFound, Unsupported, aten, is_cast, is_view, peel, value
from normquant.compile.find.quants import Arithmetic, axes_of, complete, read_arithmetic
from normquant.spec import QuantSpec

M, K = 5, 512
FP8 = torch.float8_e4m3fn
BF16 = torch.bfloat16


def norm(x, w):
    return F.rms_norm(x, (K,), w, 1e-6)


def check(quant: Callable, m: int = M, dynamic: bool = False):
    """Run norm -> quant with the pass on and compare with eager; returns the outcome and the spec."""
    x, w = exact(m, K), exact(K, seed=1) + 0.5

    def fn(x, w):
        return quant(norm(x, w))

    if dynamic:
        torch._dynamo.mark_dynamic(x, 0)
    outcome = run_with_pass(fn, x, w)
    expected = fn(x, w)
    assert_same(outcome.result, expected)
    assert [t.stride() for t in outcome.result if t.numel()] == [t.stride() for t in expected if t.numel()]
    return outcome, QuantSpec.decode(outcome.site.spec) if outcome.site.fused else None


def rows(y, group=128, floor=1e-10):
    g = y.view(y.shape[0], -1, group).float()
    s = g.abs().amax(-1, keepdim=True).clamp(min=floor) / 448.0
    return (g / s).clamp(-448, 448).to(FP8).view(y.shape), s.squeeze(-1)


def flat(y):
    g = y.reshape(-1, 128)
    s = g.float().abs().amax(1, keepdim=True).clamp(min=1e-10) / 448.0
    return (g / s).to(FP8).view(y.shape), s.view(y.shape[0], -1)


def expanded(y):
    a = y.float().unflatten(-1, (-1, 128)).abs().amax(-1).clamp(min=1e-10)
    s = a / 448.0
    wide = s[:, :, None].expand(-1, -1, 128).reshape(y.shape)
    return (y.float() / wide).clamp(-448, 448).to(FP8), s


def repeated(y):
    s = y.float().unflatten(-1, (-1, 128)).abs().amax(-1).clamp(min=1e-10) / 448.0
    return (y.float() / s.repeat_interleave(128, -1)).clamp(-448, 448).to(FP8), s


def transposed(y):
    """The amax reduces a transposed view, so the scales come out column-major."""
    g = y.view(y.shape[0], -1, 128).float()
    s = g.transpose(0, 1).abs().amax(-1).clamp(min=1e-10) / 448.0  # [G, M]
    return (g / s.t().unsqueeze(-1)).clamp(-448, 448).to(FP8).view(y.shape), s.t()


def copied_to_columns(y):
    data, s = rows(y)
    return data, s.t().contiguous().t()


def padded(y):
    data, s = rows(y)
    return data, F.pad(s.t(), (0, -y.shape[0] % 4))[:, : y.shape[0]].t()


def amax_in_bf16(y):
    s = y.view(y.shape[0], -1, 128).abs().amax(-1).float().clamp(min=1e-10) / 448.0
    return (y.view(y.shape[0], -1, 128) / s.unsqueeze(-1)).to(FP8).view(y.shape), s


def max_values(y):
    g = y.view(y.shape[0], -1, 128).float()
    s = g.abs().max(dim=-1).values.clamp(min=1e-10) / 448.0
    return (g / s[..., None]).to(FP8).view(y.shape), s


def infinity_norm(y):
    g = y.view(y.shape[0], -1, 128).float()
    s = torch.linalg.vector_norm(g, float("inf"), dim=-1, keepdim=True).clamp(min=1e-10) / 448.0
    return (g / s).to(FP8).view(y.shape), s.squeeze(-1)


def floor_of_the_scale(y):
    limits = torch.finfo(FP8)
    g = y.view(y.shape[0], -1, 128).float()
    s = torch.clamp(g.abs().amax(-1, keepdim=True) / limits.max, min=1 / (limits.max * 512))
    return (g / s).clamp(limits.min, limits.max).to(FP8).view(y.shape), s.squeeze(-1)


def deep_gemm(y):
    """As DeepGEMM casts: the bf16 values times 1/s."""
    v = y.view(y.shape[0], -1, 128)
    s = v.abs().float().amax(dim=2).view(y.shape[0], -1).clamp(1e-4) / 448.0
    return (v * (1.0 / s.unsqueeze(2))).to(FP8).view(y.shape), s


SPELLINGS = {
    "rows": (rows, {}),
    "group 64": (lambda y: rows(y, 64), {"group": 64}),
    "group 32": (lambda y: rows(y, 32), {"group": 32}),
    "floor": (lambda y: rows(y, floor=1e-4), {"floor": 1e-4}),
    "flat": (flat, {}),
    "expanded": (expanded, {}),
    "repeated": (repeated, {}),
    "amax in bf16": (amax_in_bf16, {}),
    "transposed": (transposed, {"layout": "col"}),
    "max": (max_values, {}),
    "infinity norm": (infinity_norm, {}),
    "floor of the scale": (floor_of_the_scale, {"floor": 0.0, "scale_floor": 1 / (448.0 * 512)}),
    "DeepGEMM": (deep_gemm, {"floor": 1e-4, "divide": "reciprocal"}),
    "copied to columns": (copied_to_columns, {"layout": "col"}),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling_is_fused(name: str, dynamic: bool) -> None:
    quant, fields = SPELLINGS[name]
    outcome, spec = check(quant, dynamic=dynamic)
    assert outcome.site.fused, outcome.site.reason
    assert spec == QuantSpec().replace(**fields)
    assert outcome.ops("aten.amax", "aten.clone", "aten.rsqrt") == []


def copied_into_columns(y):
    """Into a padded column-major tensor, as TMA descriptors want the scales."""
    data, s = rows(y)
    m, groups = s.shape
    columns = torch.empty((groups, (m + 3) // 4 * 4), dtype=torch.float32).transpose(0, 1)
    columns[:m, :] = s
    return data, columns[:m, :]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("m", [1, 3, 4, 5, 8])
@pytest.mark.parametrize("quant", [padded, copied_into_columns])
def test_tma_padding_comes_out_of_the_kernel(quant: Callable, m: int, dynamic: bool) -> None:
    outcome, spec = check(quant, m, dynamic and m > 1)
    assert spec is not None, outcome.site.reason
    if m % 4:
        assert spec.layout == "col_tma"
    elif quant is padded:
        assert spec.layout == "row", "a pad by nothing keeps the strides"
    else:
        assert spec.layout == ("col_tma" if dynamic else "col")
    if spec.layout != "row":
        assert outcome.ops("aten.clone", "aten.constant_pad", "aten.copy", "aten.slice_scatter", "aten.empty") == []


def scaled(by: Callable, divide: Callable) -> Callable:
    def quant(y):
        g = y.view(y.shape[0], -1, 128).float()
        amax = g.abs().amax(-1, keepdim=True).clamp(min=1e-4)
        s = by(amax)
        return divide(g, s, amax).clamp(-448, 448).to(FP8).view(y.shape), s.squeeze(-1)

    return quant


BY = {
    "scalar": lambda a: a / 448.0,
    "divide": lambda a: a / torch.full((), 448.0),
    "multiply": lambda a: a * (1.0 / 448.0),
}
DIVIDE = {
    "scale": lambda g, s, a: g / s,
    "reciprocal": lambda g, s, a: g * (1.0 / s),
    "amax": lambda g, s, a: g * (448.0 / a),
}


@pytest.mark.parametrize("divide", DIVIDE)
@pytest.mark.parametrize("by", BY)
def test_divisions_are_read_from_the_graph(by: str, divide: str) -> None:
    _, spec = check(scaled(BY[by], DIVIDE[divide]))
    assert spec == QuantSpec(floor=1e-4, scale_by=by, divide=divide)  # type: ignore[arg-type]


def ue8m0(power: Callable, floor: Callable) -> Callable:
    return scaled(lambda a: power(torch.ceil(torch.log2(floor(a / 448.0)))), DIVIDE["scale"])


@pytest.mark.parametrize(
    "floor", [lambda s: s, lambda s: s.abs(), lambda s: s.clamp(min=1e-10)], ids=["", "abs", "min"]
)
@pytest.mark.parametrize("power", [torch.exp2, lambda e: torch.pow(2.0, e)], ids=["exp2", "pow"])
def test_scales_that_are_powers_of_two(power: Callable, floor: Callable) -> None:
    _, spec = check(ue8m0(power, floor))
    assert spec is not None and spec.scale == "ue8m0"


def test_log2_rounds_no_scale_of_a_rounded_norm_onto_a_power_of_two() -> None:
    """Why `2 ** ceil(log2(s))` may become an exact rounding up: true for the amax of every positive bf16 and fp16."""
    for dtype in (torch.bfloat16, torch.float16):
        values = torch.arange(1, 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
        amax = values[values.isfinite()].clamp(min=1e-10)
        for s in (amax / 448.0, amax * (1.0 / 448.0)):
            bits = (s.view(torch.int32) + 0x7FFFFF) & 0x7F800000
            assert torch.equal(torch.exp2(torch.ceil(torch.log2(s))), bits.view(torch.float32))


def static_scale(y):
    return (y.float() / torch.full((), 0.5)).clamp(-448, 448).to(FP8)


def with_amax(change: Callable) -> Callable:
    return scaled(lambda a: change(a / 448.0), DIVIDE["scale"])


def over_all(y):
    s = y.float().abs().amax() / 448.0
    return (y.float() / s).to(FP8), s


def other_groups(y):
    """Values meet the scale of the wrong group."""
    g = y.view(y.shape[0], -1, 128).float()
    s = (g.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0).permute(0, 2, 1)
    return (g.view(y.shape[0], 128, -1) / s).to(FP8).view(y.shape), s


def strided_groups(y):
    g = y.view(y.shape[0], 128, -1).float()
    s = g.abs().amax(1, keepdim=True).clamp(min=1e-10) / 448.0
    return (g / s).to(FP8).view(y.shape), s


REJECTED = {
    "another fp8": (lambda y: ((y.float() / y.float().abs().amax(-1, keepdim=True)).to(torch.float8_e5m2),), "scale"),
    "true 448 / amax": (scaled(BY["scalar"], lambda g, s, a: g * (torch.full((), 448.0) / a)), "448 / amax"),
    "scale bound": (with_amax(lambda s: s.clamp(max=2.0)), "upper bound"),
    "scale plus": (with_amax(lambda s: s + 1e-6), "aten.add"),
    "where": (with_amax(lambda s: torch.where(s == 0, 1.0, s)), "aten.where"),
    "240": (lambda y: tuple(t for t in scaled_240(y)), "clamped"),
    "whole tensor": (over_all, "whole tensor"),
    "per row": (lambda y: rows(y, K), "group is 512"),
    "group 16": (lambda y: rows(y, 16), "group is 16"),
    "wrong groups": (other_groups, "followed"),
    "strided groups": (strided_groups, "groups"),
    "no floor": (lambda y: rows(y, floor=0.0), "floor"),
    "bf16 division": (lambda y: ((y / rows(y)[1].repeat_interleave(128, -1).to(BF16)).to(FP8),), "bfloat16"),
}


def scaled_240(y):
    g = y.view(y.shape[0], -1, 128).float()
    s = g.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0
    return (g / s).clamp(-240, 240).to(FP8).view(y.shape), s


@pytest.mark.parametrize("name", REJECTED)
def test_arithmetic_that_the_kernels_lack_is_rejected_with_the_reason(name: str) -> None:
    quant, words = REJECTED[name]
    x, w = exact(M, K), exact(K, seed=1) + 0.5
    outcome = run_with_pass(lambda x, w: quant(norm(x, w)), x, w)
    assert outcome.ops() == []
    assert words in outcome.site.reason
    assert_same(outcome.result, quant(norm(x, w)))


@pytest.mark.parametrize("layout", ["row", "col", "col_tma"])
@pytest.mark.parametrize("scale", ["fp32", "ue8m0", "ue8m0_packed"])
@pytest.mark.parametrize("group", [128, 32])
def test_our_op_keeps_its_spec(group: int, scale: str, layout: str) -> None:
    if scale == "ue8m0_packed" and layout != "col_tma":
        pytest.skip("packed scales are TMA-aligned")
    spec = QuantSpec(group=group, scale=scale, layout=layout, floor=1e-4)  # type: ignore[arg-type]

    def quant(y):
        q = nq.group_quant(y, spec=spec)
        return q.data, q.scale

    _, found = check(quant)
    assert found == spec


def test_a_static_scale_is_no_group_quantization() -> None:
    x, w = exact(M, K), exact(K, seed=1) + 0.5
    outcome = run_with_pass(lambda x, w: static_scale(norm(x, w)), x, w)
    assert outcome.sites == [] and len(outcome.reports[0].others) == 1


Y = torch.ones(M, K, dtype=BF16)


def read(quant: Callable, y: torch.Tensor = Y) -> Arithmetic:
    graph = graph_of(lambda y: quant(y), y).graph
    (cast,) = [node for node in graph.nodes if is_cast(node) and value(node).dtype in FP8_DTYPES]
    return read_arithmetic(cast, Values(graph))


def above(node: Node) -> set[Node]:
    """All that a value is computed from."""
    return set(node.all_input_nodes).union(*map(above, node.all_input_nodes))


def of_groups(data: Callable, scale: Callable = lambda a: a / 448.0, of: Callable = lambda g: g) -> Callable:
    """A quantization whose fp8 values `data` makes of groups and scales; `of` is what the amax is taken of."""

    def quant(y):
        g = y.view(y.shape[0], -1, 128).float()
        s = scale(of(g).abs().amax(-1, keepdim=True).clamp(min=1e-10))
        return data(g, s).to(FP8), s

    return quant


def divided(g, s):
    return g / s


def of_constants(y):
    g = y.view(M, -1, 128).float()
    s = torch.maximum(g.abs().amax(-1, keepdim=True), torch.full((), 1e-10)) / torch.full((), 448.0)
    return torch.minimum(g / s, torch.full((), 448.0)).to(FP8), s


def lanes_in_the_middle(y):
    g = y.view(M, -1, 128).float().transpose(1, 2)
    s = g.abs().amax(-2).clamp(min=1e-10) / 448.0
    return (g / s.unsqueeze(1)).transpose(1, 2).to(FP8), s


def up(s):
    return torch.exp2(torch.ceil(torch.log2(s)))


def up_by_bits(s):
    return ((s.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)


OTHER_WORDS: dict[str, tuple[Callable, dict]] = {
    "no clamp": (of_groups(divided), {}),
    "two clamps": (of_groups(lambda g, s: (g / s).clamp(max=448.0).view(M, K).clamp(min=-448.0).view(-1)), {}),
    "reciprocal": (of_groups(lambda g, s: torch.reciprocal(s) * g), {"divide": "reciprocal"}),
    "reciprocal of 1": (
        of_groups(lambda g, s: g * (1.0 / s.squeeze(-1)).unsqueeze(-1).expand(M, K // 128, 128)),
        {"divide": "reciprocal"},
    ),
    "true reciprocal": (of_groups(lambda g, s: (torch.full((), 1.0) / s) * g), {"divide": "reciprocal"}),
    "448 / amax": (scaled(BY["scalar"], lambda g, s, a: (448.0 / a) * g), {"floor": 1e-4, "divide": "amax"}),
    "constant tensors": (of_constants, {"scale_by": "divide"}),
    "lanes in the middle": (lanes_in_the_middle, {}),
    "ue8m0": (of_groups(divided, lambda a: up(a / 448.0)), {"scale": "ue8m0"}),
    "ue8m0 of the finite": (
        of_groups(divided, lambda a: torch.where((s := a / 448.0).abs() < float("inf"), up_by_bits(s), s)),
        {"scale": "ue8m0"},
    ),
}
IN_PARTS = SPELLINGS | OTHER_WORDS


@pytest.mark.parametrize("name", IN_PARTS)
def test_the_parts_of_a_quantization(name: str) -> None:
    quant, fields = IN_PARTS[name]
    arithmetic = read(quant)
    found = complete(arithmetic, K)
    y, *nodes = arithmetic.cast.graph.nodes
    data, scale = arithmetic.cast.graph.output_node().args[0]
    assert found.data is peel(data, is_view) is not None and found.scale in above(scale) | {scale}
    assert (found.y, found.axes) == (y, axes_of(y, K, found.spec.group))
    assert found.spec == QuantSpec(**{field: given for field, given in fields.items() if field != "layout"})
    assert order(found.scale_form or ()) == (["g", "m"] if name == "transposed" else ["m", "g"])
    assert found.scale is not None and len(found.scale_form or ()) == value(found.scale).dim()
    constants = {node for node in nodes if node.target is aten.full.default}
    assert found.inner == (above(found.data) | above(found.scale)) - {y, found.scale} - constants


def test_an_amax_of_the_same_value_computed_again() -> None:
    def quant(y):
        first, second = ((y * 2).view(M, -1, 128).float() for _ in range(2))
        s = first.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0
        return (second / s).to(FP8), s

    arithmetic = read(quant)
    found = complete(arithmetic, K)
    first, second = arithmetic.cast.graph.find_nodes(op="call_function", target=aten.mul.Tensor)
    assert (arithmetic.reduced, found.y) == (first, second)
    assert not found.inner & {first, second} and found.spec == QuantSpec()


def of_other_lanes(y):
    g = y.view(y.shape[0], -1, 128).float()
    s = g.abs().amax(0, keepdim=True).clamp(min=1e-10) / 448.0
    return (g / s).to(FP8), s


def in_the_order_of_groups(y):
    g = y.view(M, -1, 128).float().transpose(0, 1)
    s = g.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0
    return (g / s).to(FP8), s


def pieces_exchanged(y):
    g = y.view(M, 2, 2, 128).float()
    s = g.transpose(1, 2).abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0
    return (g / s.transpose(1, 2)).to(FP8), s


def finite_where_another_is(a):
    s = a / 448.0
    return torch.where(s.transpose(0, 1).abs() < float("inf"), up_by_bits(s), s)


def true_448(g, s):
    return g * (torch.full((), 448.0) / g.abs().amax(-1, keepdim=True))


FOUR_ROWS = torch.ones(4, K, dtype=BF16)  # as many as groups
REFUSED: dict[str, tuple[Callable, str, torch.Tensor]] = {
    "clamped to 240": (
        of_groups(lambda g, s: (g / s).clamp(-240.0, 240.0)),
        "the data is clamped to (None, 240.0); the kernels clamp to +-448",
        Y,
    ),
    "at least -240": (
        of_groups(lambda g, s: (g / s).clamp(min=-240.0)),
        "the data is clamped to (-240.0, None); the kernels clamp to +-448",
        Y,
    ),
    "at least 448": (
        of_groups(lambda g, s: (g / s).clamp(min=448.0)),
        "the data is clamped to (448.0, None); the kernels clamp to +-448",
        Y,
    ),
    "at most -448": (
        of_groups(lambda g, s: (g / s).clamp(max=-448.0)),
        "the data is clamped to (None, -448.0); the kernels clamp to +-448",
        Y,
    ),
    "true 448 / amax": (
        of_groups(true_448),
        "the data is y * (448 / amax); the pass reads y * (448 * (1 / amax))",
        Y,
    ),
    "2 / s": (
        of_groups(lambda g, s: g * (2.0 / s)),
        "the data is y * (2.0 * (1 / x)); the kernels support 1 and 448 for the factor",
        Y,
    ),
    "another fp8": (
        lambda y: (y.float() / (y.float().view(M, -1, 128).abs().amax() / 448.0)).to(torch.float8_e5m2),
        "the data is float8_e5m2; the kernels make float8_e4m3fn",
        Y,
    ),
    "float64": (of_groups(lambda g, s: g.double() / s), "the division by the scale is not in float32", Y),
    "another amax": (
        of_groups(divided, of=lambda g: g * 2),
        "the amax is taken of aten.mul (mul), another tensor than the quantized one, placeholder (y_1)",
        Y,
    ),
    "whole tensor": (
        over_all,
        "the scale is one of the whole tensor or of several dimensions; the kernels support one per group",
        Y,
    ),
    "per row": (lambda y: rows(y, K), "the group is 512; the kernels support 32, 64, 128", Y),
    "scales of others": (
        of_groups(lambda g, s: g / s.transpose(0, 1)),
        "the values do not meet the scale of their own group",
        FOUR_ROWS,
    ),
    "groups first": (in_the_order_of_groups, "the data is not in the order of the rows", Y),
    "pieces exchanged": (
        pieces_exchanged,
        "the scales are neither in the order of the rows nor in that of the groups",
        torch.ones(M, 2, K // 2, dtype=BF16),
    ),
    "over the rows": (
        of_other_lanes,
        "the rows and groups cannot be followed through aten.amax (amax)",
        torch.ones(128, K, dtype=BF16),
    ),
    "finite where another is": (
        of_groups(divided, finite_where_another_is),
        "the rows and groups cannot be followed through aten.where (where)",
        FOUR_ROWS,
    ),
    "log2 of an unrounded norm": (
        of_groups(divided, lambda a: up(a / 448.0)),
        "ue8m0 scales by log2 of a norm that was not rounded: the kernels round up exactly, log2 does not",
        Y.float(),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_reason_why_a_quantization_is_refused(name: str) -> None:
    quant, words, y = REFUSED[name]
    with pytest.raises(Unsupported) as caught:
        complete(read(quant, y), K)
    assert str(caught.value) == words


@pytest.mark.parametrize(
    ("k", "words"),
    [
        (500, "K is 500, not a multiple of the group, 128"),
        (384, "rows of 384 values do not fit the shape (5, 512)"),
    ],
)
def test_rows_of_another_length_are_refused(k: int, words: str) -> None:
    with pytest.raises(Unsupported) as caught:
        complete(read(rows), k)
    assert str(caught.value) == words


def test_what_a_spec_refuses_is_refused_in_its_words() -> None:
    with pytest.raises(ValueError) as refused:
        QuantSpec(floor=0.0)
    with pytest.raises(Unsupported) as caught:
        complete(read(lambda y: rows(y, floor=0.0)), K)
    assert str(caught.value) == str(refused.value)


def test_a_group_of_a_length_that_varies_is_refused() -> None:
    def quant(y):
        s = y.float().abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0
        return (y.float() / s).to(FP8)

    graph = make_fx(quant, tracing_mode="symbolic")(Y).graph
    with pytest.raises(Unsupported, match=r"^the group is s\d+; the kernels support 32, 64, 128$"):
        read_arithmetic(graph.output_node().args[0], Values(graph))


@pytest.mark.parametrize(
    ("data", "operation"),
    [
        (lambda g, s: g * s, "aten.mul"),
        (lambda g, s: g * 2.0, "aten.mul"),
        (lambda g, s: 2.0 * torch.reciprocal(s), "aten.mul"),
        (lambda g, s: g / 2.0, "aten.div"),
        (lambda g, s: g * (torch.full((), 2.0) / s), "aten.mul"),
        (lambda g, s: g * (g * s), "aten.mul"),
        (lambda g, s: g + s, "aten.add"),
        (lambda g, s: (g / s).neg(), "aten.neg"),
    ],
)
def test_data_that_no_scale_divides_is_no_quantization(data: Callable, operation: str) -> None:
    with pytest.raises(NotFound) as caught:
        read(of_groups(data))
    assert str(caught.value) == f"its data comes from {operation}; expected a division by the scale of each group"


@pytest.mark.parametrize(
    ("shape", "cuts", "single_row"),
    [
        ((5, 512), (128, 512), False),
        ((1, 512), (128, 512), True),
        ((512,), (128, 512), True),
        ((2, 3, 512), (128, 512), False),
        ((5, 4, 128), (128, 512), False),
        ((1, 2, 256), (128, 256, 512), True),
        ((5, 8, 64), (64, 128, 512), False),
    ],
    ids=str,
)
def test_axes_are_cut_where_a_shape_has_a_border(shape: tuple[int, ...], cuts: tuple[int, ...], single_row) -> None:
    y = torch.fx.Graph().placeholder("y")
    y.meta["val"] = torch.empty(shape, device="meta")
    assert axes_of(y, K, 128) == Axes(K, 128, single_row, cuts)


def test_rows_whose_number_varies_may_be_more_than_one() -> None:
    y, *_ = make_fx(lambda y: y + 1, tracing_mode="symbolic")(Y).graph.nodes
    rows, columns = y.meta["val"].shape
    assert not isinstance(columns, int)
    y.meta["val"] = y.meta["val"].new_empty(rows, K)
    assert axes_of(y, K, 128) == Axes(K, 128, False, (128, K))
