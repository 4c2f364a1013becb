"""vLLM's quantization where nothing can be fused into it: ours takes its place, exactly, where the policy says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from shared import traced_graphs, vllm_ops
from shared.traced_graphs import assert_equal, rewrite

from normquant.compile.fusions import group_quant
from normquant.spec import QuantSpec


def run(fn: Any, x: torch.Tensor, policy: Any = "always", dynamic: bool = False) -> tuple:
    return traced_graphs.run(lambda graph: rewrite(graph, group_quant.find, policy), fn, x, dynamic=dynamic)


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("layout", ["row", "col", "col_tma"])
def test_the_same_values_in_the_same_layout(layout: str, ue8m0: bool, dynamic: bool) -> None:
    def fn(x):
        return vllm_ops.per_token_group_fp8_quant(x, layout=layout, ue8m0=ue8m0)

    result, (site,), left = run(fn, tensor(5, 512), dynamic=dynamic)
    assert site.fused and site.op == "group_quant" and "its input is placeholder" in site.reason
    assert QuantSpec.decode(site.spec).layout == layout
    assert "normquant.group_quant.default" in left and not [name for name in left if "auto_functionalized" in name]
    assert_equal(result, fn(tensor(5, 512)))


def test_packed_scales() -> None:
    result, (site,), _ = run(vllm_ops.per_token_group_fp8_quant_packed, tensor(5, 1024))
    assert QuantSpec.decode(site.spec).scale == "ue8m0_packed"
    assert_equal(result, vllm_ops.per_token_group_fp8_quant_packed(tensor(5, 1024)))


@pytest.mark.parametrize("policy", ["auto", "never", "native"])
def test_other_policies_leave_it(policy: str) -> None:
    result, sites, left = run(vllm_ops.per_token_group_fp8_quant, tensor(5, 512), policy=policy)
    assert sites == [] and not [name for name in left if name.startswith("normquant")]
    assert_equal(result, vllm_ops.per_token_group_fp8_quant(tensor(5, 512)))


def test_what_the_kernel_cannot_read_stays() -> None:
    def fn(x):
        return vllm_ops.per_token_group_fp8_quant(x.float())

    _, sites, left = run(fn, tensor(5, 512))
    assert sites == [] and not [name for name in left if name.startswith("normquant")]
