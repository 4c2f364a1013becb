"""vLLM's own kernel cases on a CPU, and what its graphs may have that is none of ours."""

from __future__ import annotations

from dataclasses import fields
from itertools import groupby

import pytest
import torch
from shared import traced_graphs, vllm_ops
from shared.pass_harness import assert_same, exact, run_with_pass
from shared.traced_graphs import assert_equal, rewrite
from shared.vllm_cases import Case, cases, check, check_mixed_weight, some_cases

from normquant.compile.fusions import group_quant
from normquant.specs import VLLM

SIZES = {size: list(found) for size, found in groupby(cases(), lambda case: (case.tokens, case.hidden, case.small))}


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}{' small' * size[2]}")
def test_a_size_in_every_form(size: tuple[int, int, bool]) -> None:
    for case in SIZES[size]:
        check(case, "cpu")


def test_what_runs_on_a_gpu_has_every_choice() -> None:
    for field in fields(Case):
        assert {getattr(case, field.name) for case in some_cases()} == {getattr(case, field.name) for case in cases()}


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("rounding", ["none", "once", "twice"])
def test_a_weight_of_fp32(rounding: str, with_residual: bool) -> None:
    check_mixed_weight(VLLM.replace(group=64, rounding=rounding), with_residual, "cpu")


@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("residual", [False, True])
def test_scales_that_are_given_stay(residual: bool, group: int) -> None:
    def fn(x, r, w, s):
        y = torch.ops.vllm_ir.rms_norm(x, w, 1e-6)
        if residual:
            y, r = torch.ops.vllm_ir.fused_add_rms_norm(x, r, w, 1e-6)
        scaled = y.float().unflatten(-1, (-1, group)) * (1 / s).unsqueeze(-1)
        return scaled.clamp(-448.0, 448.0).flatten(-2).to(torch.float8_e4m3fn), r

    x, r, w = exact(7, 512), exact(7, 512, seed=1), exact(512, seed=2) + 0.5
    s = torch.rand(512 // group, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.01
    outcome = run_with_pass(fn, x, r, w, s)
    assert outcome.fused == [] and outcome.ops() == []
    assert_same(outcome.result, fn(x, r, w, s))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("layout", ["row", "col_tma"])
@pytest.mark.parametrize("heads", [(4, 64), (2, 128)])
def test_the_output_of_an_attention_with_heads(heads: tuple[int, int], layout: str, dynamic: bool) -> None:
    def fn(x):  # [M, heads, head size], quantized as rows of all heads
        return vllm_ops.per_token_group_fp8_quant((x * 2).reshape(-1, 256), layout=layout)

    x = exact(5, 256).view(5, *heads)
    result, (site,), left = traced_graphs.run(lambda graph: rewrite(graph, group_quant.find), fn, x, dynamic=dynamic)
    assert (site.op, site.k) == ("group_quant", 256) and "its input is aten.mul" in site.reason
    assert "normquant.group_quant.default" in left and not [name for name in left if "auto_functionalized" in name]
    assert_equal(result, fn(x))
