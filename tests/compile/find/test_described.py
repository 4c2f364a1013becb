"""What a quantization's input is called where no kernel computes it: in the reason of its site."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from shared import traced_graphs, vllm_ops
from shared.pass_harness import exact

from normquant.compile import Site, driver
from normquant.compile.policy import Rules

M, K = 5, 512
X, Z, HEAD, WEIGHT = exact(M, K), exact(M, K, seed=1), exact(128, seed=2) + 0.5, exact(K, seed=3) + 0.5


def rms(h: torch.Tensor) -> torch.Tensor:
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)


INPUTS: dict[str, tuple[Any, str]] = {
    "vLLM's gated norm, of a sigmoid": (
        lambda x, z: (rms(x.float()) * WEIGHT.float() * torch.sigmoid(z.float())).to(x.dtype),
        "a gated norm",
    ),
    "of heads": (
        lambda x, z: (torch.ops.vllm_ir.rms_norm(x.view(-1, 128), HEAD, 1e-6) * torch.sigmoid(z.view(-1, 128))).view(
            M, K
        ),
        "a gated norm",
    ),
    "a clamped product": (
        lambda x, z: (F.silu(x.float().clamp(max=7.0)) * z.float().clamp(-7, 7)).to(x.dtype),
        "a gated product that is clamped",
    ),
    "as of gpt-oss": (
        lambda x, z: x.clamp(max=7.0) * torch.sigmoid(1.7 * x.clamp(max=7.0)) * (z.clamp(-7, 7) + 1),
        "a gated product that is clamped",
    ),
    "a product": (lambda x, z: (F.silu(x.float()) * z.float()).to(x.dtype), "a gated product"),
    "a product without a gate": (lambda x, z: x * z, "aten.mul"),
    "a sum": (lambda x, z: (x.float() + F.silu(z.float())).to(x.dtype), "aten.add"),
}


@pytest.mark.parametrize("name", INPUTS)
def test_the_reason_says_what_the_input_is(name: str) -> None:
    fn, words = INPUTS[name]

    def quantized(x: torch.Tensor, z: torch.Tensor) -> Any:
        return vllm_ops.per_token_group_fp8_quant(fn(x, z))

    for fusions, reason in (
        (driver.VLLM_FUSIONS, f"policy always; its input is {words}, so that nothing is fused into it"),
        (driver.FUSIONS, f"its input is {words}, not an RMSNorm"),
    ):

        def rewrite(graph: torch.fx.Graph, fusions: Any = fusions) -> tuple[Site, ...]:
            report = driver.run(graph, Rules("always"), strict=True, fusions=fusions)
            return *report.sites, *report.others

        result, sites, _ = traced_graphs.run(rewrite, quantized, X, Z)
        assert [site.reason for site in sites] == [reason]
        traced_graphs.assert_equal(result, quantized(X, Z))
