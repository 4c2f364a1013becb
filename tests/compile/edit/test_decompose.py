"""The strategy `native`: Inductor itself makes one kernel of a norm and of what was an opaque quantization."""

from __future__ import annotations

import pytest
import torch
from shared.compare import assert_bitwise
from shared.pass_harness import assert_same, exact, run_with_pass
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import normquant as nq
from normquant import specs
from normquant.compile import clear, explain, inductor_options, last_report
from normquant.compile.edit.build import Builder
from normquant.compile.edit.decompose import decompose
from normquant.compile.find.graph import Unsupported
from normquant.compile.policy import Rules
from normquant.spec import QuantSpec

BF16 = torch.bfloat16
LAYOUTS = ("row", "col", "col_tma")
NESTS = "triton.nested_reduction" in torch._inductor.config.get_config_copy()
nests = pytest.mark.skipif(
    not NESTS,
    reason=f"Inductor nests reductions from torch 2.13 on; this is {torch.__version__}, where two kernels are left",
)


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # a graph from a cache has no report
    torch._dynamo.reset()
    clear()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def hf_norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def quantized(spec: QuantSpec, residual: bool = True):
    """An opaque quantization of a norm, and of the sum in front of it."""

    def fn(x, r, w):
        h = x + r if residual else x
        q = nq.group_quant(hf_norm(h, w), spec=spec)
        return q.data, q.scale, h * 1

    return fn


def generated(spec: QuantSpec, k: int, m: int = 64, any_rows: bool = False, residual: bool = True):
    """What Inductor generates for an H100, by policy native."""
    pytest.importorskip("triton", reason="triton is not installed")
    from normquant.audit import audit

    def inputs() -> tuple[torch.Tensor, ...]:
        x, r, w = (torch.empty(*shape, dtype=BF16, device="cuda") for shape in ((m, k), (m, k), (k,)))
        for rows in (x, r) if any_rows else ():
            torch._dynamo.mark_dynamic(rows, 0)
        return x, r, w

    return audit(quantized(spec, residual), inputs, options=inductor_options("native", strict=True))


def check_one_kernel(report) -> None:
    assert [site.strategy for site in last_report().sites] == ["native"], explain()
    assert report.externs == {}, "the opaque quantization is gone"
    assert len(report.kernels) == len(report.launches) == 1, [launch.name for launch in report.launches]


@nests
@pytest.mark.parametrize("k", [512, 1536, 7168])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("residual", [False, True], ids=["norm", "add norm"])
def test_norm_and_quantization_are_one_kernel(residual: bool, layout: str, k: int) -> None:
    check_one_kernel(generated(QuantSpec(layout=layout), k, residual=residual))


@nests
@pytest.mark.parametrize("m", [1, 4096])
def test_few_rows_and_many(m: int) -> None:
    check_one_kernel(generated(QuantSpec(layout="col"), 7168, m))


@nests
def test_leaving_out_nan_takes_no_second_kernel() -> None:
    check_one_kernel(generated(specs.VLLM_UE8M0, 7168))


@nests
@pytest.mark.parametrize("layout", ["row", "col"])
@pytest.mark.parametrize("scale", ["fp32", "ue8m0"])
def test_any_number_of_rows_is_one_kernel_too(scale: str, layout: str) -> None:
    report = generated(QuantSpec(layout=layout, scale=scale), 7168, any_rows=True)
    check_one_kernel(report)
    assert report.programs[0].sizes, "the rows are a symbol"
    fixed = generated(QuantSpec(layout=layout, scale=scale), 7168)
    assert [launch.bytes for launch in report.launches] == [launch.bytes for launch in fixed.launches]


def test_aligned_scales_of_any_number_of_rows_stay_opaque() -> None:
    report = generated(QuantSpec(layout="col_tma"), 7168, any_rows=True)
    (site,) = last_report().sites
    assert site.strategy == "stock" and "TMA-aligned scales take a copy" in site.reason
    assert report.externs == {"normquant.group_quant": 1}


@pytest.mark.parametrize("any_rows", [False, True], ids=["fixed rows", "any rows"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_bits_and_the_layout_of_the_opaque_operation(layout: str, any_rows: bool) -> None:
    """On this CPU, and with the roundings to bfloat16 that Inductor leaves out within a kernel by default."""
    fn = quantized(QuantSpec(layout=layout))
    options = inductor_options("native", strict=True, emulate_precision_casts=True)
    compiled = torch.compile(fn, options=options)
    for m in (8, 20) if any_rows else (8,):
        args = exact(m, 512), exact(m, 512, seed=1), exact(512, seed=2) + 0.5
        if any_rows:
            for rows in args[:2]:
                torch._dynamo.mark_dynamic(rows, 0)
        given, expected = compiled(*args), fn(*args)
        if torch.__version__ >= (2, 13):  # before, Inductor itself drops a rounding that is widened again at once
            assert_same(given, expected)
        assert [t.stride() for t in given] == [t.stride() for t in expected]
    (site,) = last_report().sites
    assert site.strategy == ("stock" if any_rows and layout == "col_tma" else "native"), site.reason


@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("second", LAYOUTS)
def test_each_quantization_of_one_norm_keeps_its_layout(first: str, second: str) -> None:
    def fn(x, w):
        y = hf_norm(x, w)
        quants = [nq.group_quant(y, spec=QuantSpec(layout=layout)) for layout in (first, second)]
        return [(q.data, q.scale) for q in quants]

    args = exact(8, 512), exact(512, seed=2) + 0.5
    outcome = run_with_pass(fn, *args, rules=Rules("native"))
    given, expected = outcome.result, fn(*args)
    assert outcome.site.strategy == "native" and outcome.ops() == [], outcome.reports
    assert_same(given, expected)
    assert [t.stride() for pair in given for t in pair] == [t.stride() for pair in expected for t in pair]


@pytest.mark.parametrize(
    "spec",
    [
        *(QuantSpec(scale="ue8m0", nan=nan, scale_by="divide") for nan in ("propagate", "ignore")),
        QuantSpec(nan="ignore"),
        QuantSpec(divide="factor", scale_by="divide"),
    ],
    ids=str,
)
def test_nan_and_inf_as_in_the_opaque_operation(spec: QuantSpec) -> None:
    def fn(x, w):  # a norm that is not one, so that a NaN and an inf stay in their group
        q = nq.group_quant(x * w, spec=spec)
        return q.data, q.scale

    x, w = exact(8, 512), exact(512, seed=2)
    graph = decomposed(fn, x, w)
    x[0, 3], x[1, 130], x[2], x[3, 7], x[3, 9] = float("nan"), float("inf"), float("nan"), float("nan"), float("inf")
    assert_bitwise(graph(x, w), fn(x, w))


def decomposed(fn, *args) -> GraphModule:
    """The graph of fn, its opaque quantizations in aten operations."""
    gm = make_fx(fn, tracing_mode="fake")(*args)
    quant = torch.ops.normquant.group_quant.default
    new = Builder(gm.graph)
    for old, made in decompose(new, gm.graph.find_nodes(op="call_function", target=quant)):
        old.replace_all_uses_with(made)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    assert not gm.graph.find_nodes(op="call_function", target=quant)
    return GraphModule(torch.nn.Module(), gm.graph)


def spread(m: int, k: int) -> torch.Tensor:
    """Values of many magnitudes, each group with another amax, one of zeros and one whose amax is below any floor."""
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 3, m)[:, None]
    x[0, :128], x[1, :128] = 0.0, 1e-30
    return x.to(BF16)


ARITHMETIC = [
    QuantSpec(),
    QuantSpec(group=64),
    QuantSpec(floor=0.5),
    QuantSpec(floor=0.0, scale_floor=1e-3),
    QuantSpec(floor=1e-4, scale_floor=1e-12),
    *(QuantSpec(scale_by=by) for by in ("multiply", "divide", "scalar")),
    *(QuantSpec(divide=divide) for divide in ("reciprocal", "amax", "factor")),
    *(QuantSpec(scale="ue8m0", divide=divide) for divide in ("scale", "reciprocal")),
    QuantSpec(scale="ue8m0", scale_by="multiply", nan="ignore"),
    *(QuantSpec(layout=layout) for layout in LAYOUTS),
]


@pytest.mark.parametrize("shape", [(8, 512), (2, 4, 512)], ids=str)
@pytest.mark.parametrize("spec", ARITHMETIC, ids=str)
def test_the_arithmetic_of_the_opaque_operation(spec: QuantSpec, shape: tuple[int, ...]) -> None:
    def fn(x):
        q = nq.group_quant(x, spec=spec)
        return q.data, q.scale

    x = spread(8, 512).view(shape)
    given, expected = decomposed(fn, x)(x), fn(x)
    assert_bitwise(given, expected)
    assert [t.stride() for t in given] == [t.stride() for t in expected]


@pytest.mark.parametrize("layout", ["row", "col"])
def test_any_number_of_rows_is_one_graph(layout: str) -> None:
    def fn(x, w):
        q = nq.group_quant(hf_norm(x, w), spec=QuantSpec(layout=layout))
        return q.data, q.scale

    w = exact(512, seed=2) + 0.5
    for m in (8, 5):
        x = exact(m, 512)
        torch._dynamo.mark_dynamic(x, 0)
        outcome = run_with_pass(fn, x, w, rules=Rules("native"))
        assert outcome.site.strategy == "native" and outcome.ops() == [], outcome.reports
        assert_bitwise(outcome.result, fn(x, w))
        stored = torch.ops.prims.inductor_force_stride_order.default
        targets = [node.target for gm in outcome.graphs for node in gm.graph.nodes]
        assert (stored in targets) == (layout == "col")


def test_scales_by_column_of_any_number_of_rows_before_torch_2_13(monkeypatch) -> None:
    def fn(x):
        q = nq.group_quant(x, spec=QuantSpec(layout="col"))
        return q.data, q.scale

    x = exact(8, 512)
    torch._dynamo.mark_dynamic(x, 0)
    (gm,) = run_with_pass(fn, x, rules=Rules("never")).graphs
    ops = gm.graph.find_nodes(op="call_function", target=torch.ops.normquant.group_quant.default)
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.12.1"))
    for old, made in decompose(Builder(gm.graph), ops):
        assert made.meta["val"].stride() == old.meta["val"].stride()
        old.replace_all_uses_with(made)
    gm.graph.eliminate_dead_code()
    assert_bitwise(GraphModule(torch.nn.Module(), gm.graph)(8, x), fn(x))


@pytest.mark.parametrize("unread", [0, 1], ids=["data", "scales"])
def test_what_nobody_reads_is_not_made(unread: int) -> None:
    def fn(x):
        return [(q := nq.group_quant(x)).data, q.scale][1 - unread]

    x = spread(8, 512)
    gm = decomposed(fn, x)
    assert torch.equal(gm(x).float(), fn(x).float())
    casts_to_fp8 = [node for node in gm.graph.nodes if torch.float8_e4m3fn in node.args]
    assert len(casts_to_fp8) == unread


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (QuantSpec(scale="ue8m0_packed", layout="col_tma"), "packed scales are not made by aten operations"),
        (QuantSpec(few_rows=32), "the rule of FlashInfer's linear kernel is not made of aten operations"),
        (QuantSpec(divide="fast_factor", floor=0.0), "the rule of FlashInfer's linear kernel is not made"),
        (QuantSpec(divide="fast_amax"), "the approximate reciprocal is not made by aten operations"),
        (QuantSpec(layout="col_tma"), "TMA-aligned scales take a copy where the rows are not a multiple of 4"),
    ],
    ids=str,
)
def test_what_aten_operations_do_not_make_is_refused(spec: QuantSpec, reason: str) -> None:
    def fn(x):
        q = nq.group_quant(x, spec=spec)
        return q.data, q.scale

    with pytest.raises(Unsupported) as caught:
        decomposed(fn, spread(6, 512))
    assert str(caught.value).startswith(reason)
