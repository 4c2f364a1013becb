"""The driver with every fusion: a rewrite that fails changes nothing, and one report has all sites of a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from shared import latent_graphs, traced_graphs, vllm_ops
from shared.pass_harness import assert_same, exact
from shared.vllm_fused_stand_ins import rms_norm_per_block_quant, silu_and_mul_per_block_quant
from torch.fx import Graph

from normquant.compile import Site, clear, driver, explain, reports
from normquant.compile.driver import VLLM_FUSIONS, NormQuantPass
from normquant.compile.edit.build import Builder
from normquant.compile.policy import Rules

K = 256
quantize = vllm_ops.per_token_group_fp8_quant


def norms(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    h = x + w
    y = torch.ops.vllm_ir.rms_norm(h, w, 1e-6)
    return *quantize(y), *quantize(y, layout="col"), y, h


def gated(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return quantize(F.silu(x[:, : K // 2]) * x[:, K // 2 :])


def lone(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return quantize((x * 2).reshape(-1, 2 * K), layout="col")


def vllms_own(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    residual = x * 0.5
    return *rms_norm_per_block_quant(x, w, residual), residual, *silu_and_mul_per_block_quant(x)


def latents(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
    *parts, q = latent_graphs.latents()(*args)
    heads = torch.mm(q.flatten(1), torch.ones(2 * latent_graphs.R, 512, dtype=q.dtype)).view(-1, 2, 256)
    cos, sin = args[3][args[4]].chunk(2, dim=-1)
    turned = latent_graphs.neighbours(heads[..., -latent_graphs.R :], cos, sin)
    return *parts, torch.cat((heads[..., : -latent_graphs.R], turned), dim=-1)


GRAPHS: dict[Callable[..., Any], tuple[tuple, set[str]]] = {
    norms: ((exact(6, K), exact(K, seed=1)), {"rms_norm_quant_with_norm"}),
    gated: ((exact(6, K), exact(K, seed=1)), {"silu_mul_quant"}),
    lone: ((exact(6, K), exact(K, seed=1)), {"group_quant"}),
    vllms_own: ((exact(6, K), exact(K, seed=1)), {"add_rms_norm_quant", "silu_mul_quant"}),
    latents: (latent_graphs.inputs(), {"latent_norm_quant", "rope_last"}),
}


def failing_at(step: int) -> Any:
    """Makes the n-th new node of the process, counted from here, an error."""
    made = Builder.__call__
    count = iter(range(10_000))

    def call(self: Builder, *args: Any, **kwargs: Any) -> Any:
        if next(count) == step:
            raise RuntimeError("planted")
        return made(self, *args, **kwargs)

    return mock.patch.object(Builder, "__call__", call)


@pytest.mark.parametrize("policy", ["always", "native"])
@pytest.mark.parametrize("fn", GRAPHS)
def test_a_rewrite_that_fails_at_any_step_leaves_the_graph_as_it_was(fn: Any, policy: Any) -> None:
    args, ops = GRAPHS[fn]
    failed: list[str] = []

    def change(graph: Graph) -> tuple[Site, ...]:
        for fusion in VLLM_FUSIONS:
            for step in range(100):
                before = str(graph)
                with failing_at(step):
                    report = driver.run(graph, Rules(policy), fusions=(fusion,))
                if "planted" not in str(report):
                    break
                failed.append(fusion.__module__)
                rewritten = [site for site in (*report.sites, *report.others) if site.strategy != "stock"]
                assert rewritten or str(graph) == before
                graph.lint()
        return driver.run(graph, Rules(policy), strict=True, fusions=VLLM_FUSIONS).sites

    result, _, left = traced_graphs.run(change, fn, *args)
    assert failed or policy == "native"
    assert_same(result, fn(*args))
    if policy == "always":
        assert ops <= {name.split(".")[1] for name in left if name.startswith("normquant.")}


def test_one_report_has_every_site_of_a_graph() -> None:
    clear()

    def change(graph: Graph) -> tuple[Site, ...]:
        return NormQuantPass(Rules("always"), True, VLLM_FUSIONS).rewrite(graph).sites

    _, sites, _ = traced_graphs.run(change, latents, *latent_graphs.inputs())
    (report,) = reports()
    assert list(report.sites) == sites and report.others == ()
    assert [site.op for site in sites] == ["latent_norm_quant", "rope_last"]
    assert all(str(site) in explain() for site in sites)
    clear()


def test_a_lone_quantization_is_listed_once_whatever_becomes_of_it() -> None:
    for policy, op in (("always", "group_quant"), ("never", "")):

        def change(graph: Graph, policy: Any = policy) -> tuple[Site, ...]:
            report = driver.run(graph, Rules(policy), True, VLLM_FUSIONS)
            return *report.sites, *report.others

        _, (site,), _ = traced_graphs.run(change, lone, exact(6, K), exact(K, seed=1))
        assert site.op == op and "its input is aten.mul" in site.reason


def test_the_text_of_a_site_says_what_differs_from_the_default_spec() -> None:
    def change(graph: Graph) -> tuple[Site, ...]:
        return driver.run(graph, Rules("always"), True, VLLM_FUSIONS).sites

    _, (site,), _ = traced_graphs.run(change, lone, exact(6, K), exact(K, seed=1))
    assert " group_quant(layout=col, scale_by=divide): policy always; its input is aten.mul" in str(site)
    assert site.spec not in str(site)
