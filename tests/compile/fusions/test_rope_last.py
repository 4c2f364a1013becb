"""The rotation of q's last values becomes one op, with the arithmetic of the graph, or stays with a reason."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from shared import latent_graphs, traced_graphs
from shared.latent_graphs import (
    halves,
    in_float32,
    neighbours,
    opaque,
    repeated,
    repeated_halves,
    to_halves,
    wrong_sign,
)
from shared.pass_harness import exact
from shared.traced_graphs import assert_equal, rewrite
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from normquant.compile import Site
from normquant.compile.fusions import latent_norm_quant, rope_last
from normquant.compile.policy import Rules
from normquant.spec import QuantSpec

M, K, H, N, R, POSITIONS = 5, 64, 3, 128, latent_graphs.R, 16
aten = torch.ops.aten
Rope = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Put = Callable[[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]], torch.Tensor]


def projected(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.mm(x, weight).view(-1, H, N + R)


def in_place(q: torch.Tensor, turn: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """As vLLM's MLA layer has it."""
    q[..., N:] = turn(q[..., N:])
    return q


def together(q: torch.Tensor, turn: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    nope, pe = q.split([N, R], dim=-1)
    return torch.cat((nope, turn(pe)), dim=-1)


def flattened(q: torch.Tensor, turn: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    return together(q, turn).flatten(1)


def attention(rope: Rope = neighbours, put: Put = in_place, project: Any = projected) -> Callable[..., tuple]:
    def fn(x, weight, cache, positions):
        cos, sin = cache[positions].chunk(2, dim=-1)
        return (put(project(x, weight), lambda q: rope(q, cos, sin)),)

    return fn


def inputs(m: int = M, dtype: torch.dtype = torch.bfloat16, cache: torch.dtype | None = None) -> tuple:
    """Inputs whose product is exact, so that only the rotation rounds."""
    generator = torch.Generator().manual_seed(3)
    angles = torch.randn(POSITIONS, R, generator=generator).to(cache or dtype)
    positions = torch.randint(0, POSITIONS, (m,), generator=generator)
    weight = torch.randint(-2, 3, (K, H * (N + R)), generator=generator).to(dtype)
    return exact(m, K, dtype=dtype), weight, angles, positions


def run(fn: Any, args: tuple | None = None, policy: Any = "always", dynamic: bool = True) -> tuple:
    x, weight, cache, positions = args or inputs()
    return traced_graphs.run(
        lambda graph: rewrite(graph, rope_last.find, policy),
        lambda x, positions: fn(x, weight, cache, positions),
        x,
        positions,
        dynamic=dynamic,
    )


def assert_untouched(left: list[str]) -> None:
    assert not [name for name in left if name.startswith("normquant")]


def assert_one_op(left: list[str]) -> None:
    """The projection, views, and the op."""
    views = ("aten.view", "aten.reshape", "aten.slice", "aten.sym_size")
    rest = [name for name in left if not name.startswith(views)]
    assert rest == ["aten.mm.default", "normquant.rope_last.default"], left


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("put", [in_place, together, flattened])
@pytest.mark.parametrize("rope", [neighbours, halves, repeated, repeated_halves, to_halves, in_float32])
def test_every_spelling(rope: Rope, put: Put, dynamic: bool) -> None:
    fn = attention(rope, put)
    result, (site,), left = run(fn, dynamic=dynamic)
    assert site.fused and (site.op, site.k) == ("rope_last", H * (N + R)), site.reason
    assert QuantSpec.decode(site.spec).rounding == ("once" if rope is in_float32 else "twice")
    assert_one_op(left)
    assert_equal(result, fn(*inputs()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [1, 16])
def test_the_number_of_rows_may_be_known(m: int, dtype: torch.dtype) -> None:
    args = inputs(m, dtype)
    result, (site,), _ = run(attention(), args, dynamic=False)
    assert site.fused and site.m == str(m), site.reason
    assert site.bytes_moved == 2 * m * (2 * H * (N + R) + R)
    assert_equal(result, attention()(*args))


def vllms_graph() -> Graph:
    """As torch 2.11 has vLLM 0.26's: q is seen as heads anew for each use, the result is a copy written over."""
    graph = Graph()
    q, cache, positions, m = (graph.placeholder(name) for name in ("q", "cache", "positions", "m"))

    def call(target: Any, *args: Any) -> Any:
        return graph.call_function(target, args)

    def last() -> Any:
        return call(aten.slice.Tensor, call(aten.reshape.default, q, [-1, H, N + R]), 2, N, 2**63 - 1)

    split = call(aten.split.Tensor, call(aten.index.Tensor, cache, [positions]), R // 2, -1)
    cos, sin = (call(aten.unsqueeze.default, call(operator.getitem, split, i), -2) for i in range(2))
    whole, target = call(aten.reshape.default, q, [-1, H, N + R]), last()
    a, b = (call(aten.slice.Tensor, last(), 2, i, 2**63 - 1, 2) for i in range(2))
    u = call(aten.sub.Tensor, call(aten.mul.Tensor, a, cos), call(aten.mul.Tensor, b, sin))
    v = call(aten.add.Tensor, call(aten.mul.Tensor, b, cos), call(aten.mul.Tensor, a, sin))
    pairs = call(aten.cat.default, [call(aten.unsqueeze.default, t, 3) for t in (u, v)], -1)
    turned = call(aten.copy.default, target, call(aten.reshape.default, pairs, [m, H, R]))
    graph.output((call(aten.slice_scatter.default, whole, turned, 2, N, 2**63 - 1),))
    return graph


class Noting(Interpreter):
    """Runs a graph on fake tensors and notes what each node makes."""

    def run_node(self, n: Any) -> Any:
        n.meta["val"] = super().run_node(n)
        return n.meta["val"]


def test_vllms_graph() -> None:
    graph = vllms_graph()
    mode = FakeTensorMode(shape_env=ShapeEnv())
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])
    x, weight, cache, positions = inputs()
    q = mode.from_tensor(torch.mm(x, weight), symbolic_context=context)
    with mode:
        m = q.shape[0]
        fake = torch.empty(POSITIONS, R, dtype=cache.dtype), torch.empty(m, dtype=torch.int64)
        Noting(GraphModule({}, graph)).run(q, *fake, m)
    (site,) = rewrite(graph, rope_last.find)
    graph.lint()
    assert site.fused and site.m == str(m), site.reason
    ops = [node.target for node in graph.nodes if node.op == "call_function"]
    assert ops == [aten.slice.Tensor, torch.ops.normquant.rope_last.default, aten.reshape.default]
    result = Interpreter(GraphModule({}, graph)).run(torch.mm(x, weight), cache, positions, M)
    assert_equal(result, attention()(x, weight, cache, positions))


def test_rows_of_a_wider_projection() -> None:
    def project(x, weight):
        return torch.mm(x, torch.cat((weight, weight[:, :8]), dim=1))[:, : H * (N + R)].view(-1, H, N + R)

    fn = attention(put=together, project=project)
    result, (site,), left = run(fn)
    assert site.fused and "normquant.rope_last.default" in left, site.reason
    assert_equal(result, fn(*inputs()))


def test_arithmetic_in_front_of_the_rotation_is_left_alone() -> None:
    fn = attention(project=lambda x, weight: projected(x, weight) + x[:, :1, None] * 2)
    result, (site,), left = run(fn)
    assert site.fused and left.count("aten.add.Tensor") == left.count("aten.mul.Tensor") == 1, left
    assert_equal(result, fn(*inputs()))


def test_two_layers_share_the_angles() -> None:
    def fn(x, weight, cache, positions):
        return *attention()(x, weight, cache, positions), *attention(halves)(-x, weight, cache, positions)

    result, sites, left = run(fn)
    assert [site.fused for site in sites] == [True, True]
    assert left.count("normquant.rope_last.default") == 2 and "aten.index.Tensor" not in left
    assert_equal(result, fn(*inputs()))


def test_after_the_latents_no_rotation_is_left() -> None:

    def fn(x, q_weight, kv_weight, cache, positions):
        data, scale, kv_norm, k_pe, _ = latent_graphs.latents()(x, q_weight, kv_weight, cache, positions)
        q = torch.mm(data.to(x.dtype), torch.ones(latent_graphs.Q, 2 * 3 * latent_graphs.R, dtype=x.dtype)).view(
            -1, 2, 3 * latent_graphs.R
        )
        cos, sin = cache[positions].chunk(2, dim=-1)
        q[..., 2 * latent_graphs.R :] = neighbours(q[..., 2 * latent_graphs.R :], cos, sin)
        return data, scale, kv_norm, k_pe, q

    def change(graph: Graph) -> tuple[Site, ...]:
        return *rewrite(graph, latent_norm_quant.find), *rewrite(graph, rope_last.find)

    args = latent_graphs.inputs()
    result, sites, left = traced_graphs.run(change, fn, *args, dynamic=False)
    assert [site.op for site in sites] == ["latent_norm_quant", "rope_last"] and all(site.fused for site in sites)
    assert not {"aten.index.Tensor", "aten.mul.Tensor", "aten.sub.Tensor"} & set(left)
    assert_equal(result, fn(*args))


def test_inductor_makes_no_kernel_for_the_op() -> None:
    args = inputs()
    torch._dynamo.reset()
    torch._dynamo.mark_dynamic(args[0], 0)
    torch._dynamo.mark_dynamic(args[-1], 0)
    compiled = torch.compile(attention(), options={"post_grad_custom_post_pass": traced_graphs.Pass(rope_last.find)})
    with torch.no_grad():
        result, (code,) = run_and_get_code(compiled, *args)
    body = code.partition("def call(")[2]
    assert body.count("torch.ops.normquant.rope_last.default(") == 1 and "cpp_fused" not in body
    assert_equal(result, attention()(*args))


def swapped(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return neighbours(x, sin, cos)


def other_rows(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return neighbours(x, cos.flip(0), sin.flip(0))


def twice_as_long(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return neighbours(x, cos, sin) * 2


def first(q: torch.Tensor, turn: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    q[..., :R] = turn(q[..., :R])
    return q


def whole(q: torch.Tensor, turn: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    return turn(q.flatten(1).view(-1, H * (N + R) // R, R))


def swapped_parts(q: torch.Tensor, turn: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    return torch.cat((turn(q[..., N:]), q[..., :N]), dim=-1)


def scaled(q: torch.Tensor, turn: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    return torch.cat((q[..., :N] * 2, turn(q[..., N:])), dim=-1)


@pytest.mark.parametrize(
    "fn",
    [
        *(attention(rope) for rope in (wrong_sign, swapped, other_rows, twice_as_long, opaque)),
        *(attention(put=put) for put in (first, whole, swapped_parts, scaled)),
    ],
)
def test_what_is_something_else_is_no_site(fn: Any) -> None:
    result, sites, left = run(fn)
    assert sites == []
    assert_untouched(left)
    assert_equal(result, fn(*inputs()))


def read_by_itself(x, weight, cache, positions):
    parts = []

    def put(q, turn):
        parts.append(turn(q[..., N:]))
        return torch.cat((q[..., :N], parts[0]), dim=-1)

    return *attention(put=put)(x, weight, cache, positions), parts[0].amax(dim=-1)


def computed_cache(x, weight, cache, positions):
    return attention()(x, weight, cache * 2, positions)


def into_the_cache(x, weight, cache, positions):
    k_pe = latent_graphs.into_the_cache(x[:, :R].unsqueeze(1), *cache[positions].chunk(2, dim=-1))
    return *attention()(x, weight, cache, positions), k_pe


def strided_positions(x, weight, cache, positions):
    return attention()(x, weight, cache, torch.stack((positions, positions), 1)[:, 0])


def column_by_column(x, weight):
    return torch.mm(weight.t(), x.t()).t().view(-1, H, N + R)


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (read_by_itself, "what is turned is also read by itself (aten.amax)"),
        (computed_cache, "the cache of cos and sin is computed in the graph"),
        (into_the_cache, "fuse_rope_kvcache_cat_mla"),
        (attention(put=flattened, project=column_by_column), "accepted: [M, H * D], bfloat16, float16, last stride 1"),
        (strided_positions, "int32 or int64, contiguous"),
    ],
)
def test_what_the_op_lacks_stays(fn: Any, words: str) -> None:
    result, (site,), left = run(fn)
    assert not site.fused and words in site.reason, site.reason
    assert_untouched(left)
    assert_equal(result, fn(*inputs()))


def test_nothing_moves_across_a_change_in_place() -> None:
    def change(graph: Graph) -> tuple[Site, ...]:
        product = next(node for node in graph.nodes if node.target is aten.mul.Tensor)
        cache = next(node for node in graph.nodes if node.target is aten.index.Tensor).args[0]
        with graph.inserting_before(product):
            graph.call_function(aten.add_.Tensor, (cache, 1))
        return rewrite(graph, rope_last.find)

    args = inputs()
    expected = attention()(*args)
    result, (site,), left = traced_graphs.run(change, attention(), *args)
    assert "a tensor is changed in place while it is computed" in site.reason
    assert_untouched(left)
    assert_equal(result, expected)


def test_the_policy_decides() -> None:
    rules = Rules("always", {"*": "stock"})
    for policy, words in (("never", "policy never"), ("auto", "no measurements on cpu"), (rules, "stock for '*'")):
        result, (site,), left = run(attention(), policy=policy)
        assert not site.fused and words in site.reason
        assert_untouched(left)
        assert_equal(result, attention()(*inputs()))
