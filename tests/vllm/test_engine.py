"""Real vLLM on a CPU with a small block-FP8 DeepSeek-V3: plugin on and off, caches, and what may go wrong.

An engine runs in a process of its own; those that several tests look at run once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from normquant.integrations.vllm_records import FILE, GraphRecord, read

HERE = Path(__file__).parent
ALWAYS = {"additional_config": {"normquant": {"policy": "always"}}}
# The graph between the attentions of layers 0 and 1 is also that between layers 1 and 2; vLLM compiles it once.
COMPILED_SITES = {
    "layers.0.input_layernorm",
    "layers.0.self_attn.mla_attn.q_a_layernorm",
    "layers.0.post_attention_layernorm",
    "layers.1.input_layernorm",
    "layers.1.self_attn.mla_attn.q_a_layernorm",
    "layers.2.post_attention_layernorm",
}
COMPILED_OTHERS = {
    "layers.0.mlp.act_fn",
    "layers.2.mlp.act_fn",
    "layers.0.self_attn.mla_attn.o_proj.quant_method.fp8_linear.quant_fp8",
    "layers.2.self_attn.mla_attn.o_proj.quant_method.fp8_linear.quant_fp8",
}
# What DeepSeek-R1 has; vLLM spells this rotary embedding in another way than the plain one.
YARN = {
    "hf_overrides": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        }
    }
}
# In a step: layer 0's first norm has no residual; the q_a norms are in one kernel with the rest of the latent.
CALLS = {"rms_norm_quant": 1, "latent_norm_quant": 3, "add_rms_norm_quant": 5, "silu_mul_quant": 3, "group_quant": 3}


@dataclass(frozen=True)
class Run:
    """An engine's last line, and what it logged."""

    result: dict[str, Any]
    log: str

    @property
    def records(self) -> list[GraphRecord]:
        return list(read(Path(self.result["cache"]) / FILE))

    @property
    def says(self) -> list[str]:
        return [line for line in self.log.splitlines() if "normquant 0." in line or "normquant left" in line]


def run_engine(cache_root: Path, options: dict[str, Any], **environ: str) -> Run:
    done = subprocess.run(
        [sys.executable, str(HERE / "engine.py"), json.dumps(options)],
        env=environment(cache_root, **environ),
        capture_output=True,
        text=True,
        timeout=600,
        cwd=cache_root,
    )
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-6000:]
    return Run(json.loads(done.stdout.splitlines()[-1]), log)


def environment(cache_root: Path, **environ: str) -> dict[str, str]:
    """Of an engine whose caches lie under a folder, with the shims on the path and NORMQUANT as given or unset."""
    stock = {name: value for name, value in os.environ.items() if not name.startswith("NORMQUANT")}
    return {
        **stock,
        "VLLM_CACHE_ROOT": str(cache_root / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache_root / "inductor"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE / "shims"), os.environ.get("PYTHONPATH")])),
        **environ,
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(scope="module")
def off(root: Path) -> Callable[[], Run]:
    return cache(lambda: run_engine(root, {}))


@pytest.fixture(scope="module")
def on(root: Path, off: Callable[[], Run]) -> Callable[[], Run]:
    """Switched on, with the caches that the engine without it has filled."""

    def run() -> Run:
        off()
        return run_engine(root, ALWAYS, NORMQUANT="1", NORMQUANT_SHIM="verify", NORMQUANT_SHIM_OUT=str(root))

    return cache(run)


def assert_same_output(given: Run, expected: Run) -> None:
    assert given.result["tokens"] == expected.result["tokens"]
    assert given.result["logprobs"] == expected.result["logprobs"]


def test_without_a_switch_vllm_is_stock(off: Callable[[], Run]) -> None:
    result = off().result
    assert result["calls"] == {} and off().says == []
    assert not (Path(result["cache"]) / FILE).exists()


def test_the_model_is_no_constant(off: Callable[[], Run]) -> None:
    tokens = off().result["tokens"]
    assert len({token for row in tokens for token in row}) > 8  # or equal tokens would say nothing


def test_every_site_is_one_op(on: Callable[[], Run]) -> None:
    sites = [site for record in on().records for site in record.report["sites"]]
    assert sorted(site["name"] for site in sites) == sorted(COMPILED_SITES | COMPILED_OTHERS)
    assert [site["reason"] for site in sites if not site["fused"]] == []
    assert on().result["calls"] == CALLS


def test_every_site_is_exact(on: Callable[[], Run], root: Path) -> None:
    on()
    compared = [json.loads(line) for line in (root / "sites.jsonl").read_text().splitlines()]
    assert {site["name"] for site in compared} == COMPILED_SITES
    for site in compared:
        assert site["data"] and site["scales"]
        assert (site["data_differ"], site["scales_differ"], site["others_differ"]) == (0, 0, 0), site


def test_greedy_tokens_are_the_same(on: Callable[[], Run], off: Callable[[], Run]) -> None:
    assert_same_output(on(), off())


def test_the_log_names_the_report(on: Callable[[], Run]) -> None:
    (line,) = on().says
    assert f"`normquant vllm-report {on().result['cache']}`" in line and "policy always" in line


def test_switching_never_serves_the_other_graph(root: Path, on: Callable[[], Run], off: Callable[[], Run]) -> None:
    assert on().result["cache"] != off().result["cache"] and on().result["hash"] != off().result["hash"]
    before = (Path(on().result["cache"]) / FILE).read_text()
    again = run_engine(root, ALWAYS, NORMQUANT="1")
    assert again.result["hash"] == on().result["hash"]
    assert (Path(on().result["cache"]) / FILE).read_text() == before  # from the cache: nothing was compiled
    assert again.result["calls"] == CALLS
    assert_same_output(again, off())
    stock = run_engine(root, {}, NORMQUANT="0")
    assert stock.result["hash"] == off().result["hash"] and stock.result["calls"] == {}
    assert_same_output(stock, off())


def test_an_unknown_version_is_left_alone(root: Path, off: Callable[[], Run]) -> None:
    off()
    run = run_engine(root, {}, NORMQUANT="1", NORMQUANT_SHIM="other_version")
    assert run.result["hash"] == off().result["hash"] and run.result["calls"] == {}
    (line,) = run.says
    assert "leaves vLLM as it is" in line and "0.26 to 0.26 are supported" in line
    assert_same_output(run, off())


def test_a_failing_pass_does_not_stop_the_engine(tmp_path: Path, off: Callable[[], Run]) -> None:
    run = run_engine(tmp_path, ALWAYS, NORMQUANT_SHIM="failing_pass")
    assert run.result["calls"] == {}
    assert {record.report["error"] for record in run.records} == {"RuntimeError: planted by a test"}
    assert "normquant left a graph as it was: RuntimeError: planted by a test" in run.log
    assert (
        run.log.count("normquant: _fail failed: RuntimeError: planted by a test") == 12
    )  # four rewrites, three graphs
    assert_same_output(run, off())


def test_the_rotation_of_deepseek_r1_is_in_the_latent_too(tmp_path: Path, off: Callable[[], Run]) -> None:
    stock, run = run_engine(tmp_path, YARN), run_engine(tmp_path, ALWAYS | YARN)
    assert stock.result["tokens"] != off().result["tokens"]  # it is another rotation
    assert [site["reason"] for record in run.records for site in record.report["sites"] if not site["fused"]] == []
    assert run.result["calls"] == CALLS
    assert_same_output(run, stock)


def test_quantization_in_plain_torch_is_found_too(tmp_path: Path) -> None:
    run = run_engine(tmp_path, ALWAYS, NORMQUANT_SHIM="native_quant")
    sites = [site for record in run.records for site in record.report["sites"]]
    assert {site["name"] for site in sites} == COMPILED_SITES
    assert [site["reason"] for site in sites if not site["fused"]] == []
    calls = {name.removesuffix("_with_norm"): count for name, count in run.result["calls"].items()}
    assert calls == {name: count for name, count in CALLS.items() if "norm" in name}  # Inductor has the gated product
