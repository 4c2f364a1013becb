"""The three parts of the MLA latent become one op, with the arithmetic of the graph, or stay with a reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from shared import traced_graphs, vllm_ops
from shared.latent_graphs import (
    _C,
    _VLLM,
    POSITIONS,
    C,
    Q,
    R,
    Rope,
    a_part,
    another_eps,
    decomposed,
    gemma,
    halves,
    in_columns,
    in_float32,
    inputs,
    into_the_cache,
    latents,
    neighbours,
    norm,
    once,
    opaque,
    other_rows,
    products,
    repeated,
    repeated_halves,
    swapped,
    to_halves,
    wrong_sign,
)
from shared.traced_graphs import assert_equal, rewrite
from torch._inductor.utils import run_and_get_code
from torch.fx import Graph

from normquant.compile import Site
from normquant.compile.fusions import latent_norm_quant
from normquant.compile.policy import Rules
from normquant.spec import QuantSpec


def run(fn: Any, args: tuple | None = None, policy: Any = "always", dynamic: bool = False) -> tuple:
    x, q_weight, kv_weight, cache, positions = args or inputs()
    return traced_graphs.run(
        lambda graph: rewrite(graph, latent_norm_quant.find, policy),
        lambda x, positions: fn(x, q_weight, kv_weight, cache, positions),
        x,
        positions,
        dynamic=dynamic,
    )


def assert_untouched(left: list[str]) -> None:
    assert not [name for name in left if name.startswith("normquant")]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("rope", [neighbours, halves, repeated, repeated_halves, to_halves])
def test_every_spelling_of_the_rotation(rope: Rope, dynamic: bool) -> None:
    result, (site,), left = run(latents(rope), dynamic=dynamic)
    assert site.fused and (site.op, site.k, site.kernels_saved) == ("latent_norm_quant", Q, 2), site
    assert left.count("normquant.latent_norm_quant.default") == 1
    assert not [name for name in left if "auto_functionalized" in name or "vllm_ir" in name]
    assert_equal(result, latents(rope)(*inputs()))


def test_a_slice_for_each_time_that_the_model_says_k_pe() -> None:
    # as torch 2.11 has vLLM's graph: the two halves of the pairs are read from two slices, the angles gathered twice
    def fn(x, q_weight, kv_weight, cache, positions):
        data, scale = vllm_ops.per_token_group_fp8_quant(norm(x.split([Q, C + R], dim=-1)[0], q_weight))
        kv_norm = norm(x.split([Q, C + R], dim=-1)[1].split([C, R], dim=-1)[0], kv_weight)
        first, second = (x.split([Q, C + R], dim=-1)[1].split([C, R], dim=-1)[1].unsqueeze(1) for _ in range(2))
        cos, sin = cache[positions].chunk(2, dim=-1)[0], cache[positions].chunk(2, dim=-1)[1]
        turned = products(first[..., ::2], second[..., 1::2], cos.unsqueeze(-2), sin.unsqueeze(-2))
        return data, scale, kv_norm, torch.stack(turned, dim=-1).flatten(-2)

    result, (site,), left = run(fn, dynamic=True)
    assert site.fused, site.reason
    assert left.count("normquant.latent_norm_quant.default") == 1 and "aten.index.Tensor" not in left
    assert_equal(result, fn(*inputs()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("layout", ["row", "col", "col_tma"])
def test_every_quantization(layout: str, ue8m0: bool, dtype: torch.dtype) -> None:
    fn = latents(layout=layout, ue8m0=ue8m0)
    result, (site,), _ = run(fn, inputs(dtype=dtype), dynamic=True)
    assert site.fused, site.reason
    spec = QuantSpec.decode(site.spec)
    assert (spec.rounding, spec.layout, spec.is_ue8m0) == ("twice", layout, ue8m0)
    assert_equal(result, fn(*inputs(dtype=dtype)))


def test_the_number_of_rows_may_be_known() -> None:
    for m in (1, 16):
        result, (site,), _ = run(latents(), inputs(m))
        assert site.fused and site.m == str(m)
        assert_equal(result, latents()(*inputs(m)))


def test_norms_in_aten_operations() -> None:
    fn = latents(norms=(decomposed, decomposed))
    result, (site,), left = run(fn, dynamic=True)
    assert site.fused and "aten.rsqrt.default" not in left
    assert_equal(result, fn(*inputs()))


def test_a_quantization_in_aten_operations() -> None:
    fn = latents(quantize=in_columns)
    result, (site,), left = run(fn, dynamic=True)
    assert site.fused and "aten.amax.default" not in left
    for given, expected in zip(result, fn(*inputs()), strict=True):
        assert given.shape == expected.shape and torch.equal(given.float(), expected.float())


def test_two_layers_in_one_graph() -> None:
    def fn(x, q_weight, kv_weight, cache, positions):
        first = latents()(x, q_weight, kv_weight, cache, positions)
        return *first, *latents(halves)(x.flip(0), q_weight, kv_weight, cache, positions)

    result, sites, left = run(fn, dynamic=True)
    assert [site.fused for site in sites] == [True, True]
    assert left.count("normquant.latent_norm_quant.default") == 2
    assert_equal(result, fn(*inputs()))


def test_only_the_rotation_of_q_is_left() -> None:
    _, _, left = run(latents(), dynamic=True)
    assert left.count("aten.index.Tensor") == 1 and left.count("aten.mul.Tensor") == 4


def test_the_op_stands_where_its_inputs_are() -> None:
    def fn(x, q_weight, kv_weight, cache, positions):
        return latents()(x, q_weight, kv_weight, cache, (positions * 3 + 1) % POSITIONS)

    result, (site,), _ = run(fn, dynamic=True)
    assert site.fused
    assert_equal(result, fn(*inputs()))


def test_inductor_makes_no_kernel_for_the_op() -> None:
    args = inputs()
    torch._dynamo.reset()
    torch._dynamo.mark_dynamic(args[0], 0)
    torch._dynamo.mark_dynamic(args[-1], 0)
    options = {"post_grad_custom_post_pass": traced_graphs.Pass(latent_norm_quant.find)}
    compiled = torch.compile(lambda *args: latents()(*args)[:4], options=options)
    with torch.no_grad(), torch._inductor.config.patch(enable_auto_functionalized_v2=False):
        result, (code,) = run_and_get_code(compiled, *args)
    body = code.partition("def call(")[2]
    assert body.count("torch.ops.normquant.latent_norm_quant.default(") == 1 and "cpp_fused" not in body
    assert_equal(result, latents()(*args)[:4])


_C.define("rotary_embedding(Tensor(a!) key, Tensor angles) -> ()")
torch.library.register_fake("_C::rotary_embedding", lambda key, angles: None, lib=_C)


_VLLM.define("unified_mla_kv_cache_update(Tensor k_pe) -> Tensor")
_VLLM.impl("unified_mla_kv_cache_update", torch.clone, "CPU")
torch.library.register_fake("vllm::unified_mla_kv_cache_update", torch.empty_like, lib=_VLLM)


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (latents(norms=(norm, another_eps)), "epsilons 1e-06 and 1e-05"),
        (latents(norms=(norm, once)), "rounding='once', that of q_a 'twice'"),
        (latents(opaque), "and what reads it (_C.rotary_embedding)"),
        (latents(in_float32), "rounds once, after the sum"),
        (latents(norms=(gemma, gemma)), "a weight has an offset"),
        (latents(quantize=in_columns, norms=(norm, gemma)), "a weight has an offset"),
        (latents(into_the_cache), "fuse_rope_kvcache_cat_mla"),
        (latents(a_part), "no rotary embedding"),
        (latents(wrong_sign), "no rotary embedding"),
        (latents(swapped), "no rotary embedding"),
        (latents(other_rows), "no rotary embedding"),
    ],
)
def test_what_the_op_lacks_stays(fn: Any, words: str) -> None:
    result, (site,), left = run(fn)
    assert not site.fused and words in site.reason, site.reason
    assert site.reason.startswith("not in one kernel with the norm of q_a: ")
    assert_untouched(left)
    assert_equal(result, fn(*inputs()))


def test_a_rotation_that_is_rounded_once_goes_with_norms_that_are() -> None:
    fn = latents(in_float32, norms=(once, once))
    result, (site,), _ = run(fn)
    assert site.fused and QuantSpec.decode(site.spec).rounding == "once"
    assert_equal(result, fn(*inputs()))


def test_a_cache_that_the_graph_computes_stays() -> None:
    def fn(x, q_weight, kv_weight, cache, positions):
        return latents()(x, q_weight, kv_weight, cache.to(x.dtype), positions)

    args = inputs(cache=torch.float32)
    result, (site,), left = run(fn, args)
    assert "the cache of cos and sin is computed in the graph" in site.reason
    assert_untouched(left)
    assert_equal(result, fn(*args))


def test_a_norm_of_q_that_is_read_elsewhere_stays() -> None:
    def fn(x, q_weight, kv_weight, cache, positions):
        normed = []

        def kept(x, weight):
            normed.append(norm(x, weight))
            return normed[0]

        return *latents(norms=(kept, norm))(x, q_weight, kv_weight, cache, positions), normed[0] * 2

    result, (site,), left = run(fn)
    assert "the norm of q_a is also read" in site.reason
    assert_untouched(left)
    assert_equal(result, fn(*inputs()))


def test_a_norm_of_q_that_is_quantized_twice_stays() -> None:
    def quantize(y):
        data, scale = vllm_ops.per_token_group_fp8_quant(y)
        return data, torch.cat((scale, vllm_ops.per_token_group_fp8_quant(y, ue8m0=True)[1]))

    result, sites, left = run(latents(quantize=quantize))
    assert sites and all("quantized in more than one way" in site.reason for site in sites)
    assert_untouched(left)
    assert_equal(result, latents(quantize=quantize)(*inputs()))


def test_a_cache_with_more_than_the_angles_stays() -> None:
    def fn(x, q_weight, kv_weight, cache, positions):
        data, scale = vllm_ops.per_token_group_fp8_quant(norm(x[:, :Q], q_weight))
        cos, sin = cache[positions][:, :R].chunk(2, dim=-1)
        return data, scale, norm(x[:, Q : Q + C], kv_weight), neighbours(x[:, Q + C :].unsqueeze(1), cos, sin)

    x, q_weight, kv_weight, cache, positions = inputs()
    args = x, q_weight, kv_weight, torch.cat((cache, cache), dim=1), positions
    result, (site,), left = run(fn, args)
    assert "no rotary embedding" in site.reason
    assert_untouched(left)
    assert_equal(result, fn(*args))


def test_leading_dimensions_stay() -> None:
    def fn(x, q_weight, kv_weight, cache, positions):
        data, scale = vllm_ops.per_token_group_fp8_quant(norm(x[..., :Q], q_weight).view(-1, Q))
        cos, sin = cache[positions].chunk(2, dim=-1)
        k_pe = neighbours(x[..., Q + C :].unsqueeze(-2), cos, sin)
        return data, scale, norm(x[..., Q : Q + C], kv_weight), k_pe

    x, *rest, positions = inputs()
    args = x.unsqueeze(0).repeat(2, 1, 1), *rest, positions.repeat(2).view(2, -1)
    result, (site,), left = run(fn, args)
    assert "k_pe has shape (2, 5, 64)" in site.reason
    assert_untouched(left)
    assert_equal(result, fn(*args))


def test_columns_that_are_not_read_as_a_whole_stay() -> None:
    def fn(x, q_weight, kv_weight, cache, positions):
        data, scale = vllm_ops.per_token_group_fp8_quant(norm(x[:, :Q], q_weight))
        cos, sin = cache[positions].chunk(2, dim=-1)
        k_pe = torch.stack(products(x[:, Q + C : Q + C + R // 2], x[:, Q + C + R // 2 :], cos, sin), dim=-1)
        return data, scale, norm(x[:, Q : Q + C], kv_weight), k_pe

    result, (site,), left = run(fn)
    assert "the columns after kv_a are not read as a whole" in site.reason
    assert_untouched(left)
    assert_equal(result, fn(*inputs()))


def test_a_kv_that_is_no_multiple_of_the_group_stays() -> None:
    def fn(x, q_weight, kv_weight, cache, positions):
        data, scale = vllm_ops.per_token_group_fp8_quant(norm(x[:, :Q], q_weight))
        cos, sin = cache[positions].chunk(2, dim=-1)
        return (
            data,
            scale,
            norm(x[:, Q : Q + C - 32], kv_weight[: C - 32]),
            neighbours(x[:, Q + C - 32 :].unsqueeze(1), cos, sin),
        )

    args = inputs()
    args = args[0][:, : Q + C - 32 + R].contiguous(), *args[1:]
    result, (site,), left = run(fn, args)
    assert f"kv_a has K = {C - 32}; K must be a positive multiple of the group, 128" in site.reason
    assert_untouched(left)
    assert_equal(result, fn(*args))


def test_positions_that_depend_on_q_stay() -> None:
    def fn(x, q_weight, kv_weight, cache, positions):
        data, scale = vllm_ops.per_token_group_fp8_quant(norm(x[:, :Q], q_weight))
        cos, sin = cache[(positions + (scale[:, 0] > 1e9)) % POSITIONS].chunk(2, dim=-1)
        return data, scale, norm(x[:, Q : Q + C], kv_weight), neighbours(x[:, Q + C :].unsqueeze(1), cos, sin)

    result, (site,), left = run(fn)
    assert "is computed after a part of the latents was used" in site.reason
    assert_untouched(left)
    assert_equal(result, fn(*inputs()))


def test_nothing_moves_across_a_change_in_place() -> None:
    def change(graph: Graph) -> tuple[Site, ...]:
        index = next(node for node in graph.nodes if node.target is torch.ops.aten.index.Tensor)
        with graph.inserting_before(index):
            graph.call_function(torch.ops.aten.add_.Tensor, (index.args[0], 1))
        return rewrite(graph, latent_norm_quant.find)

    x, q_weight, kv_weight, cache, positions = inputs()
    original = cache.clone()
    result, (site,), left = traced_graphs.run(change, latents(), x, q_weight, kv_weight, cache, positions)
    assert "a tensor is changed in place between the three parts" in site.reason
    assert_untouched(left)
    assert_equal(result, latents()(x, q_weight, kv_weight, original + 1, positions))


def test_without_a_norm_of_kv_there_is_no_site() -> None:
    fn = latents(norms=(norm, lambda x, weight: x * weight))
    result, sites, left = run(fn)
    assert sites == []
    assert_untouched(left)
    assert_equal(result, fn(*inputs()))


def test_the_policy_decides() -> None:
    rules = Rules("always", {"*": "stock"})
    for policy, words in (("never", "policy never"), ("auto", "no measurements on cpu"), (rules, "stock for '*'")):
        result, (site,), left = run(latents(), policy=policy)
        assert not site.fused and words in site.reason
        assert_untouched(left)
        assert_equal(result, latents()(*inputs()))
