"""The driver with every fusion: a rewrite that fails changes nothing, and one report has all sites of a graph."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from shared import latent_graphs, traced_graphs, vllm_ops
from shared.pass_harness import assert_same, exact
from shared.vllm_fused_stand_ins import rms_norm_per_block_quant, silu_and_mul_per_block_quant
from torch.fx import Graph, Interpreter, Node

import normquant as nq
from normquant.compile import Site, clear, driver, explain, reports
from normquant.compile.driver import VLLM_FUSIONS, NormQuantPass
from normquant.compile.edit.build import Builder
from normquant.compile.fusions.vllm_linear import QuantizedInputs
from normquant.compile.policy import Rules

K = 256
LINEAR = exact(K, K, seed=3).to(torch.float8_e4m3fn), torch.rand(K // 128, K // 128)
ALL = (QuantizedInputs(), *VLLM_FUSIONS)
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


def linear(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = torch.ops.vllm_ir.rms_norm(x, w, 1e-6)
    return torch.ops.vllm.dynamic_flashinfer_deepgemm_blockscale_gemm(y, *LINEAR, 128, True), y.shape[0] * w


def twice(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Norms that are computed once, and returned as two tensors."""
    h = x + w
    y, again = (F.rms_norm(h, (K,), w, 1e-6) for _ in range(2))
    q = nq.group_quant(y)
    return q.data, q.scale, nq.group_quant(again).scale, y, again, h * x.shape[0]


GRAPHS: dict[Callable[..., Any], tuple[tuple, set[str]]] = {
    norms: ((exact(6, K), exact(K, seed=1)), {"rms_norm_quant_with_norm"}),
    gated: ((exact(6, K), exact(K, seed=1)), {"silu_mul_quant"}),
    linear: ((exact(6, K), exact(K, seed=1)), {"rms_norm_quant"}),
    twice: ((exact(6, K), exact(K, seed=1)), {"rms_norm_quant_with_norm"}),
    lone: ((exact(6, K), exact(K, seed=1)), {"group_quant"}),
    vllms_own: ((exact(6, K), exact(K, seed=1)), {"add_rms_norm_quant", "silu_mul_quant"}),
    latents: (latent_graphs.inputs(), {"latent_norm_quant", "rope_last"}),
}


STEPS = (  # whatever changes a graph
    (Builder, "__call__"),
    (Node, "replace_all_uses_with"),
    (Node, "replace_input_with"),
    (Graph, "erase_node"),
    (Graph, "eliminate_dead_code"),
    (driver, "clean"),
    (driver, "keep_outputs_apart"),
)


class Planted(RuntimeError):
    """The error of a step that was made to fail."""


@contextmanager
def failing_at(step: int, after: bool) -> Iterator[None]:
    """Makes the n-th step, counted from here, an error, before it does anything or after it has done its work."""
    count = itertools.count()

    def failing(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            fails = next(count) == step
            if fails and not after:
                raise Planted
            made = original(*args, **kwargs)
            if fails:
                raise Planted
            return made

        return call

    with ExitStack() as patches:
        for owner, name in STEPS:
            patches.enter_context(mock.patch.object(owner, name, failing(getattr(owner, name))))
        yield


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("policy", ["always", "native"])
@pytest.mark.parametrize("fn", GRAPHS)
def test_a_rewrite_that_fails_at_any_step_leaves_the_graph_as_it_was(fn: Any, policy: Any, after: bool) -> None:
    args, ops = GRAPHS[fn]
    gm, inputs = traced_graphs.traced(fn, *args)
    before, expected = traced_graphs.listing(gm.graph), Interpreter(gm).run(*inputs)
    for step in itertools.count():
        whole, part = traced_graphs.copied(gm), traced_graphs.copied(gm)
        try:
            with failing_at(step, after):
                driver.run(whole.graph, Rules(policy), strict=True, fusions=ALL)
            break
        except Planted:
            assert traced_graphs.listing(whole.graph) == before, f"step {step}"
        with failing_at(step, after):
            report = driver.run(part.graph, Rules(policy), fusions=ALL)
        assert "Planted" in str(report), f"step {step}"
        if all(site.strategy == "stock" for site in (*report.sites, *report.others)):
            assert traced_graphs.listing(part.graph) == before, f"step {step}"
        part.graph.lint()
        assert_same(Interpreter(part).run(*inputs), expected, f"step {step}")
    assert_same(Interpreter(whole).run(*inputs), expected)
    assert step > 0 or policy == "native"
    if policy == "always":
        left = {str(node.target) for node in whole.graph.nodes if node.op == "call_function"}
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
