"""Every spelling of RMSNorm: recognised with its own arithmetic, or rejected with the reason."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from shared.pass_harness import assert_same, exact, run_with_pass, site_of_graph
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

import normquant as nq
from normquant.compile.edit.build import Builder
from normquant.compile.find.duplicates import Values
from normquant.compile.find.graph import NotFound, Unsupported, aten
from normquant.compile.find.norms import (
    Addition,
    Norm,
    _weight,
    check_roundings,
    read_decomposed,
    source,
    weight_and_offset,
)
from normquant.spec import QuantSpec

M, K, EPS = 5, 256, 1e-6
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def rstd(h, eps=EPS):
    return torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)


def quant(y):
    g = y.reshape(y.shape[0], -1, 128).float()
    s = g.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0
    return (g / s).clamp(-448, 448).to(torch.float8_e4m3fn).view(y.shape), s.squeeze(-1)


def hf(x, w):
    h = x.float()
    return w * (h * rstd(h)).to(x.dtype)


def gemma(x, w):
    h = x.float()
    return (h * rstd(h) * (1.0 + w.float())).type_as(x)


def gemma4(x, w):
    h = x.float()
    return (h * torch.pow(h.pow(2).mean(-1, keepdim=True) + EPS, -0.5) * w.float()).type_as(x)


def unrounded(x, w):
    h = x.float()
    return h * rstd(h) * w


def inner(x, w):
    h = x.float()
    return (h * rstd(h)).to(x.dtype) * w.float()


def summed(x, w):
    h = x.float()
    ss = (h * h).sum(-1, keepdim=True) / h.shape[-1]
    return w * (h * torch.rsqrt(ss + EPS)).to(x.dtype)


def in_groups(x, w):
    h = x.float().view(x.shape[0], -1, 128)
    r = torch.rsqrt(h.pow(2).mean((1, 2), keepdim=True) + EPS)
    return ((h * r).to(x.dtype) * w.view(-1, 128)).view(x.shape)


def no_keepdim(x, w):
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1) + EPS).unsqueeze(-1)).to(x.dtype)


def expanded(x, w):
    h = x.float()
    return w.expand_as(x) * (h * rstd(h).expand(h.shape)).to(x.dtype)


SPELLINGS = {
    "transformers": (hf, "twice", 0.0),
    "F.rms_norm": (lambda x, w: F.rms_norm(x, (K,), w, EPS), "once", 0.0),
    "torch's default epsilon": (lambda x, w: F.rms_norm(x, (K,), w), "once", 0.0),
    "gemma": (gemma, "once", 1.0),
    "gemma 4": (gemma4, "once", 0.0),
    "unrounded": (unrounded, "none", 0.0),
    "rounded inside": (inner, "inner", 0.0),
    "sum over K": (summed, "twice", 0.0),
    "in groups": (in_groups, "twice", 0.0),
    "no keepdim": (no_keepdim, "twice", 0.0),
    "expanded": (expanded, "twice", 0.0),
}


@pytest.mark.parametrize("weight_dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling_is_fused_with_its_own_roundings(name: str, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    norm, rounding, _ = SPELLINGS[name]
    if weight_dtype == BF16 and dtype == FP16:
        weight_dtype = FP16
    elif weight_dtype == FP32 and rounding == "twice":
        rounding = "inner"  # bf16 * fp32 is fp32
    if name in ("F.rms_norm", "torch's default epsilon") and weight_dtype == FP32:
        pytest.skip("F.rms_norm takes a weight of x's dtype")
    x, w = exact(M, K, dtype=dtype), exact(K, seed=1).to(weight_dtype) + 0.5

    def fn(x, w):
        return quant(norm(x, w))

    outcome = run_with_pass(fn, x, w)
    assert outcome.site.fused, outcome.site.reason
    assert QuantSpec.decode(outcome.site.spec).rounding == rounding
    assert outcome.ops("aten.rsqrt", "aten.pow", "aten.amax") == []
    assert_same(outcome.result, fn(x, w))


@pytest.mark.parametrize("eps", [1e-30, 1e-12, 1e-6, 0.25])  # 0 is refused by the op: ops/test__tensors.py
def test_epsilon_and_offset_are_read_from_the_graph(eps: float) -> None:
    def fn(x, w):
        h = x.float()
        return quant((h * rstd(h, eps) * (w.float() + 0.75)).to(BF16))

    x, w = exact(M, K), exact(K, seed=1)
    outcome = run_with_pass(fn, x, w)
    (call,) = [n for n in outcome.graphs[0].graph.nodes if "normquant" in str(n.target)]
    assert call.args[2:4] == (eps, 0.75)
    assert_same(outcome.result, fn(x, w))


def rounded_add(x, r):
    return x + r


def fp32_add(x, r):
    return x.float() + r.float()


def fp32_add_rounded(x, r):
    return (x.float() + r.float()).to(x.dtype)


@pytest.mark.parametrize("keep", [True, False], ids=["sum kept", "sum unread"])
@pytest.mark.parametrize(
    ("add", "total"),
    [(rounded_add, "rounded"), (fp32_add, "fp32"), (fp32_add_rounded, "rounded")],
)
def test_residual_add_goes_into_the_op(add: Callable, total: str, keep: bool) -> None:
    def fn(x, r, w):
        h = add(x, r)
        y = w * (h.float() * rstd(h.float())).to(BF16)
        return (*quant(y), h.to(BF16)) if keep else quant(y)

    args = exact(M, K), exact(M, K, seed=1), exact(K, seed=2) + 0.5
    outcome = run_with_pass(fn, *args)
    assert outcome.site.op == "add_rms_norm_quant"
    assert QuantSpec.decode(outcome.site.spec).sum == total
    assert outcome.ops("aten.add") == []
    assert_same(outcome.result, fn(*args))


@pytest.mark.parametrize(
    "add",
    [lambda x, r: torch.add(x, r, alpha=2), lambda x, r: x + r[0], lambda x, r: x + 1.5, lambda x, r: x + r.float()],
    ids=["alpha", "broadcast", "number", "mixed"],
)
def test_an_add_that_is_no_residual_add_stays(add: Callable) -> None:
    def fn(x, r, w):
        return quant(hf(add(x, r).to(BF16), w))

    args = exact(M, K), exact(M, K, seed=1), exact(K, seed=2) + 0.5
    outcome = run_with_pass(fn, *args)
    assert outcome.site.op in ("rms_norm_quant", "add_rms_norm_quant")
    assert outcome.ops("aten.add") != [] or outcome.site.op == "add_rms_norm_quant"
    assert_same(outcome.result, fn(*args))


def bf16_throughout(x, w):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * w


def mean_root(x):
    return torch.sqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)


def root(x, w):
    return (x.float() / mean_root(x)).to(BF16) * w


def reciprocal_root(x, w):
    return (x.float() * (1 / mean_root(x))).to(BF16) * w


def weight_first(x, w):
    h = x.float()
    return (h * (rstd(h) * w.float())).to(BF16)


def rounded_rstd(x, w):
    h = x.float()
    return (h * rstd(h).to(BF16).float()).to(BF16) * w


def other_dtype(x, w):
    h = x.float()
    return (h * rstd(h)).to(FP16) * w.to(FP16)


def other_tensor(x, w):
    h = x.float()
    return (h * rstd(h + 1)).to(BF16) * w


def first_dim(x, w):
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(0, keepdim=True) + EPS)).to(BF16) * w


def part_of_the_row(x, w):
    h = x.float()
    return (h * rstd(h[:, :128])).to(BF16) * w


def test_dividing_by_the_root_gives_other_bits_than_rsqrt():
    """So neither is read as the other."""
    x = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    variance = x.pow(2).mean(-1, keepdim=True) + EPS
    divided, multiplied = x / variance.sqrt(), x * variance.rsqrt()
    assert (divided != multiplied).float().mean() > 0.1
    assert (divided.to(FP16) != multiplied.to(FP16)).any()


# Before 2.13 Inductor itself drops a rounding that is widened again at once, so there the graph has none.
ROUNDED_RSTD = {rounded_rstd: "rstd is rounded"} if torch.__version__ >= (2, 13) else {}
REJECTED = {
    bf16_throughout: "bfloat16",
    root: "divides by a square root; the kernels multiply by rsqrt, which gives other bits",
    lambda x, w: (x.float() / mean_root(x)).to(BF16): "divides by a square root",
    lambda x, w: (x.float() * w / mean_root(x)).to(BF16): "divides by a square root",
    lambda x, w: (x / mean_root(x).expand(x.shape)).to(BF16) * w: "divides by a square root",
    reciprocal_root: "reciprocal of a square root; the kernels take rsqrt, which gives other bits",
    weight_first: "rstd first",
    **ROUNDED_RSTD,
    other_dtype: "float16",
    other_tensor: "another tensor",
    first_dim: "last dimensions",
    part_of_the_row: "another tensor",
    lambda x, w: (x.float() * rstd(x.float())).to(BF16): "no weight",
    lambda x, w: (x.float() * rstd(x.float()) * w[:1]).to(BF16): "weight has shape",
    lambda x, w: hf(x.float() * 0.5, w.float()).to(BF16): "reads float32",
    lambda x, w: (x.float() * torch.rsqrt(x.float().abs().mean(-1, keepdim=True) + EPS)).to(BF16) * w: "not of squares",
    lambda x, w: (x.float() * torch.rsqrt(x.float().pow(2).amax(-1, keepdim=True) + EPS)).to(BF16) * w: "not of a mean",
    lambda x, w: hf(x.t().contiguous().t(), w): "stride",
}


@pytest.mark.parametrize(("norm", "words"), REJECTED.items(), ids=lambda v: v if isinstance(v, str) else "")
def test_arithmetic_that_the_kernels_lack_is_rejected_with_the_reason(norm: Callable, words: str) -> None:
    def fn(x, w):
        return quant(norm(x, w))

    x, w = exact(M, K), exact(K, seed=1) + 0.5
    outcome = run_with_pass(fn, x, w)
    assert not outcome.site.fused
    assert words in outcome.site.reason
    assert outcome.ops() == []
    assert_same(outcome.result, fn(x, w))


def test_a_norm_module_of_torch_before_our_quantization() -> None:
    norm = torch.nn.RMSNorm(K, eps=1e-5, dtype=BF16).requires_grad_(False)
    outcome = run_with_pass(lambda x: nq.group_quant(norm(x)).data, exact(2, 3, K))
    assert outcome.site.fused and outcome.site.m == "6"
    assert_same(outcome.result, nq.group_quant(norm(exact(2, 3, K))).data)


def fused_norm(x, w, shape=(K,), eps: float | None = 1e-5):
    """The graph of `aten._fused_rms_norm`, which a trace for a CPU takes apart, and a quantization."""
    graph = torch.fx.Graph()
    mode = torch._subclasses.FakeTensorMode()
    nodes = [graph.placeholder(name) for name in ("x", "w")]
    for node, t in zip(nodes, (x, w), strict=True):
        node.meta["val"] = mode.from_tensor(t)
    new = Builder(graph)
    y = new(torch.ops.aten._fused_rms_norm.default, nodes[0], list(shape), nodes[1], eps)
    y = new(operator.getitem, y, 0)
    rows = new(torch.ops.aten.reshape.default, y, [-1, K])
    if x.dtype not in (BF16, FP16):
        rows = new(torch.ops.prims.convert_element_type.default, rows, BF16)
    q = new(torch.ops.normquant.group_quant.default, rows, QuantSpec().encode())
    graph.output(tuple(new(operator.getitem, q, i) for i in range(2)))
    return torch.fx.GraphModule({}, graph)


@pytest.mark.parametrize("eps", [1e-5, None])
@pytest.mark.parametrize("shape", [(K,), (2, K // 2)], ids=str)
def test_the_norm_that_torch_has_as_one_operation(shape: tuple[int, ...], eps: float | None) -> None:
    x, w = exact(M, *shape), exact(*shape, seed=1) + 0.5
    gm = fused_norm(x, w, shape, eps)
    expected = gm(x, w)
    site = site_of_graph(gm)
    assert site.fused and QuantSpec.decode(site.spec).rounding == "once", site
    assert_same(gm(x, w), expected)


def test_that_operation_on_what_the_kernels_do_not_read() -> None:
    site = site_of_graph(fused_norm(exact(M, K).float() + 0.125, exact(K).float()))
    assert not site.fused and "reads float32" in site.reason


def nodes(fn: Callable, *args: torch.Tensor, mode: str = "fake") -> tuple[list[Node], Node, list[Node]]:
    """The inputs of fn, what it returns first, and all calls."""
    graph = make_fx(fn, tracing_mode=mode)(*args).graph
    returned = graph.output_node().args[0]
    first = returned[0] if isinstance(returned, (tuple, list)) else returned
    return graph.find_nodes(op="placeholder"), first, [node for node in graph.nodes if node.op == "call_function"]


W = torch.ones(K, dtype=BF16)
ROWS = torch.ones(M, K, dtype=BF16)


def read(y: Node) -> Norm:
    return read_decomposed(y, Values(y.graph))


def computed_from(node: Node) -> set[Node]:
    """A value and everything that depends on it."""
    return {node}.union(*map(computed_from, (user for user in node.users if user.op == "call_function")))


def viewed(x, w):
    h = x.float()
    n = (h * rstd(h)).view(1, M, K).to(BF16).view(-1, K)
    return (n.float() * w).view(1, M, K).to(BF16).view(M, K)


def n_viewed(x, w):
    h = x.float()
    return (h * rstd(h)).view(1, M, K).to(BF16) * w.float()


def widened(x, w):
    h = x.float()
    return w * (h * rstd(h)).float()


IN_PARTS = {
    **{name: spelling for name, spelling in SPELLINGS.items() if spelling[0] in (hf, gemma, gemma4, unrounded, inner)},
    **{name: spelling for name, spelling in SPELLINGS.items() if spelling[0] in (in_groups, no_keepdim, expanded)},
    "viewed": (viewed, "twice", 0.0),
    "n viewed": (n_viewed, "inner", 0.0),
    "cast to its own dtype": (widened, "none", 0.0),
}


@pytest.mark.parametrize("name", IN_PARTS)
def test_the_parts_of_a_norm(name: str) -> None:
    norm, rounding, offset = IN_PARTS[name]
    (x, w), y, calls = nodes(norm, ROWS, W)
    squares = next(node for node in calls if node.target is aten.pow.Tensor_Scalar)
    inside = frozenset(computed_from(squares) - {y})
    assert read(y) == Norm(y, x, None, w, offset, EPS, rounding, BF16, K, inside)  # type: ignore[arg-type]


def test_the_parts_of_a_norm_of_a_sum() -> None:
    (x, r, w), y, calls = nodes(lambda x, r, w: hf(x.float() + r.float(), w), ROWS, ROWS.clone(), W)
    total = next(node for node in calls if node.target is aten.add.Tensor)
    inside = frozenset(computed_from(total) - {y})
    assert read(y) == Norm(y, None, Addition(x, r, "fp32", ()), w, 0.0, EPS, "none", BF16, K, inside)
    assert read(y).sources == (x, r)


def test_a_sum_that_is_squared_and_written_down_again() -> None:
    def fn(x, r, w):
        return w * ((x + r).float() * rstd((x + r).float())).to(BF16)

    (x, r, _), y, calls = nodes(fn, ROWS, ROWS.clone(), W)
    first, second = [node for node in calls if node.target is aten.add.Tensor][:2]
    found = read(y)
    assert (found.x, found.sources, found.again) == (first, (first,), {second})
    assert found.addition == Addition(x, r, "rounded", (first,))


RSTD_FIRST = "the weight is multiplied with rstd first; the kernels multiply x with rstd first"
NUMBER_FIRST = "rstd is multiplied with a number first; the kernels multiply x with rstd first"
NO_WEIGHT = "the norm has no weight, or its weight is multiplied with x or rstd before they are with each other"
DIVIDES = "the norm divides by a square root; the kernels multiply by rsqrt, which gives other bits"
REFUSED = {
    "rstd first": (weight_first, RSTD_FIRST),
    "rstd first, then x": (lambda x, w: w.float() * rstd(x.float()) * x, RSTD_FIRST),
    "a number first": (lambda x, w: x * (rstd(x.float()) * 2.0), NUMBER_FIRST),
    "a number first, then x": (lambda x, w: (2.0 * rstd(x.float())).to(BF16).view(-1, 1) * x, NUMBER_FIRST),
    "another rstd": (
        lambda x, w: hf(x, rstd(w.float())),
        "what was normalized is multiplied with another rstd, not with a weight",
    ),
    "no weight": (lambda x, w: (x.float() * rstd(x.float())).to(BF16), NO_WEIGHT),
    "no weight, rstd in front": (lambda x, w: rstd(x.float()) * x.float(), NO_WEIGHT),
    "x by the weight first": (lambda x, w: x.float() * w * rstd(x.float()), NO_WEIGHT),
    "division": (lambda x, w: (x / mean_root(x)).view(1, M, K).to(BF16) * w, DIVIDES),
    "division, weight in front": (lambda x, w: w * (x / mean_root(x)).to(BF16).view(M, K), DIVIDES),
    "division and no weight": (lambda x, w: (x / mean_root(x)).view(1, M, K).to(BF16), DIVIDES),
    "rounded to float64": (lambda x, w: (x.float() * rstd(x.float())).double() * w, "the norm is rounded to float64"),
    "rounded to float64 and back": (
        lambda x, w: (x.float() * rstd(x.float())).double().to(BF16) * w,
        "the norm is rounded to float64",
    ),
    "another dtype inside": (other_dtype, "the norm of a bfloat16 tensor is rounded to float16"),
    "another dtype": (lambda x, w: unrounded(x, w).to(FP16), "the norm of a bfloat16 tensor is rounded to float16"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_reason_why_a_product_is_not_read_as_a_norm(name: str) -> None:
    norm, words = REFUSED[name]
    _, y, _ = nodes(norm, ROWS, W)
    with pytest.raises(Unsupported) as caught:
        read(y)
    assert str(caught.value) == words


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, w: x + w,
        lambda x, w: x * w,
        lambda x, w: x * 2.0,
        lambda x, w: x.float() * rstd(x.float()) * 2.0,
        lambda x, w: unrounded(x, w) + w,
        lambda x, w: x / w,
        lambda x, w: x * (x * w),
    ],
)
def test_other_arithmetic_is_no_norm(fn: Callable) -> None:
    _, y, _ = nodes(fn, ROWS, W)
    with pytest.raises(NotFound):
        read(y)


def test_rows_of_a_length_that_varies_are_refused() -> None:
    _, y, _ = nodes(hf, ROWS, W, mode="symbolic")
    with pytest.raises(Unsupported, match=r"^K is symbolic \(s\d+\); the kernels need it as a constant$"):
        read(y)


@pytest.mark.parametrize(
    ("factor", "offset"),
    [
        (lambda w: w, 0.0),
        (lambda w: w.float(), 0.0),
        (lambda w: w.float().view(1, K), 0.0),
        (lambda w: w.view(1, K).float(), 0.0),
        (lambda w: w.float() + 1.0, 1.0),
        (lambda w: 2 + w.float(), 2.0),
        (lambda w: (w.float() + 1.0).view(1, K), 1.0),
        (lambda w: w.view(1, K).float() + 1.0, 1.0),
        (lambda w: w.float().view(1, K) + 1.0, 1.0),
        (lambda w: torch.add(w.float(), 1.0, alpha=1), 1.0),
    ],
)
def test_a_factor_is_a_weight_and_what_is_added_to_it(factor: Callable, offset: float) -> None:
    (w,), scale, _ = nodes(factor, W)
    assert weight_and_offset(scale) == (w, offset)


@pytest.mark.parametrize(
    "factor",
    [
        lambda w: w + 1.0,
        lambda w: torch.add(w.float(), 1.0, alpha=2),
        lambda w: w.float() + w.float(),
        lambda w: w.float() * 2.0,
        lambda w: w.float().sigmoid(),
    ],
)
def test_other_arithmetic_is_the_weight(factor: Callable) -> None:
    _, scale, _ = nodes(factor, W)
    assert weight_and_offset(scale) == (scale, 0.0)


@pytest.mark.parametrize(
    ("factor", "trailing"),
    [
        (lambda w: w, (K,)),
        (lambda w: w.view(1, K), (K,)),
        (lambda w: w.view(1, 1, K).expand(2, 3, K), (K,)),
        (lambda w: w.view(2, K // 2), (2, K // 2)),
        (lambda w: w.view(1, 2, K // 2), (2, K // 2)),
        (lambda w: w.view(1, K), (1, K)),
    ],
)
def test_a_weight_of_one_value_per_column(factor: Callable, trailing: tuple[int, ...]) -> None:
    (w,), scale, _ = nodes(factor, W)
    node, offset = _weight(scale, trailing)
    assert offset == 0.0 and (node is w or w in node.all_input_nodes)


@pytest.mark.parametrize(
    ("factor", "words"),
    [
        (lambda x: x, f"the weight has shape (5, {K}); the kernels take one value per column"),
        (lambda x: x[0, :128], "the weight has shape (128,); the kernels take one value per column"),
        (lambda x: x[:1].unsqueeze(0)[:, :, :1].squeeze(0), "the weight has shape (1, 1); the kernels take one value"),
        (lambda x: x.sum(-1, keepdim=True), "one value per row, aten.sum of shape (5, 1), not with a weight"),
        (lambda x: x.view(1, M, K).amax(-1, keepdim=True).float(), "one value per row, aten.amax of shape (1, 5, 1)"),
        (lambda x: x.amax(-1).view(M, 1), "one value per row, aten.amax of shape (5, 1), not with a weight"),
        (lambda x: x.view(M, 2, -1).sum(-1, keepdim=True), "one value per row, aten.sum of shape (5, 2, 1)"),
        (lambda x: x[0].to(torch.int32), "the weight is int32; the kernels take bfloat16, float16 and float32"),
        (lambda x: x[0].double(), "the weight is float64; the kernels take"),
    ],
)
def test_what_is_no_weight_is_refused_by_its_shape_or_dtype(factor: Callable, words: str) -> None:
    _, scale, _ = nodes(factor, ROWS)
    with pytest.raises(Unsupported) as caught:
        _weight(scale, (K,))
    assert words in str(caught.value)


def test_what_a_norm_reads() -> None:
    (x,), h, _ = nodes(lambda x: x.float(), ROWS)
    assert source(h, K, set()) == (x, None)
    (x, r), h, (total, *_) = nodes(lambda x, r: (x + r).float(), ROWS, ROWS.clone())
    assert source(h, K, set()) == (total, Addition(x, r, "rounded", (total,)))
    (x, r), h, calls = nodes(lambda x, r: (x.float() + r.float()).to(BF16).float(), ROWS, ROWS.clone())
    assert source(h, K, set()) == (calls[3], Addition(x, r, "rounded", (calls[3],)))


def test_a_norm_reads_a_copy_whose_rows_are_contiguous_where_those_of_its_source_are_not() -> None:
    _, h, (_, copy, *_) = nodes(lambda x: x.t().contiguous().float(), ROWS.t().contiguous())
    assert source(h, K, set()) == (copy, None) and copy.target is aten.clone.default


def test_an_unrounded_sum_that_a_norm_reads() -> None:
    def fn(x, r):
        h = x.float() + r.float()
        views = h.view(-1).view(2, -1), h.view(M, 2, -1)
        return h, h.to(BF16), h.to(FP16), h.double(), views, h * 2

    (x, r), h, calls = nodes(fn, ROWS, ROWS.clone())
    stored = next(node for node in calls if node.meta["val"].dtype == BF16)
    views = {node for node in calls if node.target is aten.view.default}
    inner = {x}
    assert source(h, K, inner) == (None, Addition(x, r, "fp32", (stored,)))
    assert inner == {x, h, *views} and len(views) == 3


@pytest.mark.parametrize(
    ("total", "other"),
    [
        (lambda x, r: x.float() + r.float(), torch.ones(M, 1, dtype=BF16)),
        (lambda x, r: r.float() + x.float(), torch.ones(1, M, K, dtype=BF16)),
        (lambda x, r: x.float() + r.float(), torch.ones(M, K, dtype=FP16)),
        (lambda x, r: x.float() + r, torch.ones(M, K)),
        (lambda x, r: torch.add(x.float(), r.float(), alpha=2), ROWS),
        (lambda x, r: x.float() + 1.0, ROWS),
    ],
)
def test_sums_that_the_kernels_do_not_make(total: Callable, other: torch.Tensor) -> None:
    _, h, _ = nodes(total, ROWS, other)
    with pytest.raises(
        Unsupported, match=r"the norm reads float32 \(aten.add\); the kernels read bfloat16 and float16"
    ):
        source(h, K, set())


@pytest.mark.parametrize(
    ("h", "words"),
    [
        (
            lambda x, r: x.float() * r.float(),
            "the norm reads float32 (aten.mul); the kernels read bfloat16 and float16",
        ),
        (lambda x, r: x.double() + r.double(), "the norm reads float64 (aten.add); the kernels read"),
    ],
)
def test_other_inputs_that_the_kernels_do_not_read(h: Callable, words: str) -> None:
    _, node, _ = nodes(h, ROWS, ROWS.clone())
    with pytest.raises(Unsupported) as caught:
        source(node, K, set())
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "total",
    [
        lambda x, r: (x[:, :1] + r).float(),
        lambda x, r: torch.add(x, r, alpha=2).float(),
        lambda x, r: (x + 1.0).float(),
        lambda x, r: ((h := x.float() + r.float()).to(BF16).float(), h * 2),
        lambda x, r: (x.to(FP16) + r.to(FP16)).to(BF16).float(),
    ],
)
def test_a_rounded_sum_that_the_kernels_do_not_make_stays_outside(total: Callable) -> None:
    _, h, _ = nodes(total, ROWS, ROWS.clone())
    x, addition = source(h, K, set())
    assert x is not None and x.meta["val"].dtype == BF16 and addition is None


def test_a_rounding_to_another_dtype_is_named() -> None:
    _, _, calls = nodes(lambda x: (x.float(), x.to(FP16)), ROWS)
    check_roundings(set(calls[:1]), BF16)
    with pytest.raises(Unsupported, match="the norm of a bfloat16 tensor is rounded to float16"):
        check_roundings(set(calls), BF16)
