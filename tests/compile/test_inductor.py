"""The pass inside real compiles on a CPU: caches, options, export, graph breaks, and failures that break nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from unittest import mock

import pytest
import torch
from shared.pass_harness import exact, share_of_the_pass
from torch._dynamo.utils import counters

import normquant as nq
from normquant.compile import clear, explain, inductor_options, last_report, reports
from normquant.linear import BlockFP8Linear
from normquant.spec import QuantSpec

ROOT = Path(__file__).parents[2]
BF16 = torch.bfloat16


class Block(torch.nn.Module):
    """Residual add, norm, block-FP8 linear."""

    def __init__(self, k: int = 256, n: int = 128) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = torch.nn.RMSNorm(k, eps=1e-6, dtype=BF16)
        self.linear = BlockFP8Linear.from_linear(torch.nn.Linear(k, n, bias=False, dtype=BF16))

    def forward(self, x: torch.Tensor, r: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = x + r
        return self.linear(self.norm(h)), h


ARGS = (exact(8, 256), exact(8, 256, seed=1))


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    clear()
    with torch.no_grad():
        yield
    torch._dynamo.reset()
    clear()


def check(options, fn=None, args=ARGS, **compile_options):
    """Compile, run and compare with eager; returns the compiled function."""
    fn = fn or Block().eval()
    compiled = torch.compile(fn, options=options, **compile_options)
    for given, expected in zip(compiled(*args), fn(*args), strict=True):
        torch.testing.assert_close(given, expected, rtol=0, atol=0)
    return compiled


@pytest.mark.parametrize(
    "more",
    [{}, {"freezing": True}, {"cpp_wrapper": True}, {"emulate_precision_casts": True}],
    ids=["plain", "freezing", "cpp_wrapper", "precision casts"],
)
def test_options_of_inductor(more: dict) -> None:
    check(inductor_options("always", strict=True, **more), fullgraph=True)
    report = last_report()
    assert report is not None and [site.op for site in report.fused] == ["add_rms_norm_quant"], explain()


def test_auto_on_a_cpu_leaves_the_graph_alone() -> None:
    check(inductor_options())
    assert last_report().fused == () and "no measurements on cpu" in explain()  # type: ignore[union-attr]


def test_one_compile_for_every_number_of_rows() -> None:
    block = Block().eval()
    compiled = torch.compile(block, options=inductor_options("always", strict=True), dynamic=True)
    for m in (8, 3, 65):
        args = exact(m, 256), exact(m, 256, seed=m)
        for given, expected in zip(compiled(*args), block(*args), strict=True):
            torch.testing.assert_close(given, expected, rtol=0, atol=0)
    assert len(reports()) == 1 and last_report().sites[0].m.startswith("s")  # type: ignore[union-attr]


def test_graph_breaks_and_several_graphs() -> None:
    block = Block().eval()

    def fn(x, r):
        first, h = block(x, r)
        torch._dynamo.graph_break()
        return first, *block(h, x)

    with torch._inductor.config.patch(force_disable_caches=True):  # the second graph is the first one again
        check(inductor_options("always", strict=True), fn)
    assert [len(report.fused) for report in reports()] == [1, 1]


def test_one_norm_for_readers_that_each_write_it_down() -> None:
    """Their results stay tensors of their own, in the layouts that they had."""
    norm = Block().norm

    def fn(x, r):
        by_row, by_column = (nq.group_quant(norm(x + r), spec=QuantSpec(layout=layout)) for layout in ("row", "col"))
        return by_row.scale, by_column.scale, by_row.data.float(), norm(x + r), norm(x + r)

    given = check(inductor_options("always", strict=True), fn)(*ARGS)
    assert [site.op for site in last_report().fused] == ["add_rms_norm_quant_with_norm"]  # type: ignore[union-attr]
    assert [t.stride() for t in given] == [t.stride() for t in fn(*ARGS)]
    assert len({t.untyped_storage().data_ptr() for t in given}) == len(given)


@pytest.mark.skipif(
    torch.__version__ < (2, 13),
    reason="before 2.13 AOTInductor loses outputs of custom ops written in Python",
)
def test_export_and_aot_inductor(tmp_path) -> None:
    block = Block().eval()
    rows = torch.export.Dim("m", min=2, max=4096)
    program = torch.export.export(block, ARGS, dynamic_shapes=({0: rows}, {0: rows}))
    options = inductor_options("always", strict=True)
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "block.pt2"), inductor_configs=options
    )
    assert len(last_report().fused) == 1  # type: ignore[union-attr]
    for given, expected in zip(torch._inductor.aoti_load_package(package)(*ARGS), block(*ARGS), strict=True):
        torch.testing.assert_close(given, expected, rtol=0, atol=0)


def test_training_graphs_keep_what_the_backward_reads() -> None:
    norm = torch.nn.RMSNorm(256, dtype=BF16)
    linear = Block().linear

    def loss(x):
        y = norm(x)
        return linear(y.detach()).float().sum() + y.float().sum()

    with torch.enable_grad():
        torch.compile(loss, options=inductor_options("always", strict=True))(exact(8, 256)).backward()
        given, norm.weight.grad = norm.weight.grad, None
        loss(exact(8, 256)).backward()
    torch.testing.assert_close(given, norm.weight.grad, rtol=2e-2, atol=2e-2)


def test_regional_compile_compiles_once_for_all_layers() -> None:
    """Each layer with options of its own, as diffusers and accelerate compile; Dynamo stops at 8 compiles of a code."""
    layers = [Block(n=256).eval() for _ in range(12)]
    x, first = ARGS
    y = expected = first
    for layer in layers:
        expected = sum(layer(expected, x))
        layer.compile(options=inductor_options("always", strict=True))
    counters.clear()
    for layer in layers:
        y = sum(layer(y, x))
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    assert counters["stats"]["unique_graphs"] == 1 and len(reports()) == 1


def test_an_exception_in_the_pass_breaks_no_compile_unless_strict() -> None:
    def broken(*args, **kwargs):
        raise RuntimeError("a defect")

    with mock.patch("normquant.compile.fusions.norm_quant.find_sites", broken):
        check(inductor_options("always"))
        assert "compiled as it was: RuntimeError: a defect" in explain()
        torch._dynamo.reset()
        with pytest.raises(Exception, match="a defect"):
            check(inductor_options("always", strict=True))


def test_an_exception_in_one_rewrite_leaves_that_site_and_the_graph_whole() -> None:
    with mock.patch("normquant.compile.fusions.norm_quant.shaped", side_effect=RuntimeError("a defect")):
        check(inductor_options("always"))
    (site,) = last_report().sites  # type: ignore[union-attr]
    assert not site.fused and site.reason == "the rewrite failed: RuntimeError: a defect"


def test_the_report_names_the_place_and_says_why() -> None:
    check(inductor_options("always", sites={"norm": "stock"}))
    (site,) = last_report().sites  # type: ignore[union-attr]
    assert (site.name, site.reason, site.k, site.m) == ("norm", "stock for 'norm'", 256, "8")
    assert site.where.startswith(__file__), site.where
    assert "0 of 1 norm -> quant sites fused" in explain() and str(site) in explain()
    record = last_report().to_dict()  # type: ignore[union-attr]
    assert record["sites"][0]["fused"] is False and record["policy"] == "always"


def test_the_pass_costs_little_of_a_compile() -> None:
    def compile_once() -> None:
        torch._dynamo.reset()
        with torch._inductor.config.patch(force_disable_caches=True):
            check(inductor_options("always"))

    compile_once()  # imports and registrations happen once
    assert share_of_the_pass(compile_once) <= 0.05


CACHED = """
    import sys, torch
    sys.path.insert(0, {tests!r})
    from compile.test_inductor import ARGS, Block
    from normquant.compile import inductor_options, reports
    from torch._dynamo.utils import counters
    with torch.no_grad():
        torch.compile(Block().eval(), options=inductor_options({policy!r}))(*ARGS)
    fx, aot = counters["inductor"], counters["aot_autograd"]
    print(fx["fxgraph_cache_hit"], fx["fxgraph_cache_miss"], fx["fxgraph_cache_bypass"],
          aot["autograd_cache_hit"], aot["autograd_cache_miss"], aot["autograd_cache_bypass"], len(reports()))
"""


@pytest.mark.exhaustive
def test_a_second_process_hits_both_caches_and_another_option_misses(tmp_path) -> None:
    def process(policy: str) -> str:
        source = textwrap.dedent(CACHED.format(tests=str(ROOT / "tests"), policy=policy))
        env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
        env["TORCH_LOGS"] = "+normquant"
        done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=300, env=env)
        assert done.returncode == 0, done.stderr
        logged = done.stderr.count("norm -> quant sites fused (policy")
        assert logged == int(done.stdout.split()[-1]), "each report is logged once"
        return done.stdout.strip()

    assert process("always") == "0 1 0 0 1 0 1"
    assert process("always") == "1 0 0 1 0 0 0"
    assert process("never") == "0 1 0 0 1 0 1"
