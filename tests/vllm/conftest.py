"""The engines that the tests look at, each in a process of its own and run once, and what every process of vLLM gets.

A test asks for an engine by the name of its setting. Engines are forks of one process that has imported vLLM. They run
from the start of the session; tests that start vLLM by themselves come first, so that no core waits for another.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from shared import forked_engines

from normquant.vllm.graph_records import FILE, GraphRecord, find, read

Environment = Callable[[Path], dict[str, str]]
HERE = Path(__file__).parent
# vLLM binds a thread to every core; where several processes run at once, each waits at every barrier for the others'.
ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
ALWAYS = {"additional_config": {"normquant": {"policy": "always"}}}
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
DENSE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 256,
    "intermediate_size": 256,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 1024,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
}
# vLLM has no FP8 experts for a CPU. What they read is quantized inside of them, so that no graph shows the difference.
EXPERTS = DENSE | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "quantization_config": DENSE["quantization_config"]
    | {"modules_to_not_convert": [f"model.layers.{i}.mlp.{part}" for i in range(6) for part in ("experts", "gate")]},
}
# vLLM would put a pass for MLA into the graph of a whole model, and that pass needs CUDA.
PASSES = {"fuse_norm_quant": False, "fuse_act_quant": False, "fuse_rope_kvcache_cat_mla": False}
ONE_GRAPH = {"splitting_ops": [], "custom_ops": ["+quant_fp8", "+rms_norm"], "pass_config": PASSES}
PARTITIONED = {
    "use_inductor_graph_partition": True,
    "custom_ops": ["+quant_fp8", "-rms_norm"],
    "pass_config": PASSES,
}


EAGER = {"enforce_eager": True}  # nothing is compiled
CHECK = {"NORMQUANT_CHECK": "1"}
# Prompts of 9 to 11 tokens, in steps of at most 8, and again with what is cached of them.
CHUNKED = {"enable_prefix_caching": True, "enable_chunked_prefill": True, "max_num_batched_tokens": 8}
SPECULATIVE = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}}


@dataclass(frozen=True)
class Setting:
    """Of an engine. after: the engine whose caches it goes on with; without one it has caches of its own."""

    options: dict[str, Any] = field(default_factory=dict)
    environ: dict[str, str] = field(default_factory=dict)
    after: str = ""


# Two ranks over gloo; on a GPU vLLM puts its all-reduce into the graph as one operation, which the shims do here.
RANKS = ALWAYS | {"tensor_parallel_size": 2}

# What others wait for comes first, and then what takes longest.
SETTINGS = {
    "off": Setting(),
    "failing_pass": Setting(ALWAYS, {"NORMQUANT_SHIM": "failing_pass"}),
    "yarn_off": Setting(YARN),
    "yarn_on": Setting(ALWAYS | YARN),
    "on": Setting(ALWAYS, {"NORMQUANT": "1", "NORMQUANT_SHIM": "verify"}, after="off"),
    "native_quant": Setting(ALWAYS, {"NORMQUANT_SHIM": "native_quant"}),
    "dense_off": Setting({"config": DENSE, "compilation": ONE_GRAPH}),
    "dense_on": Setting(ALWAYS | {"config": DENSE, "compilation": ONE_GRAPH}),
    "dense_partitioned": Setting(ALWAYS | {"config": DENSE, "compilation": PARTITIONED}),
    "experts_off": Setting({"config": EXPERTS, "compilation": ONE_GRAPH}),
    "experts_on": Setting(ALWAYS | {"config": EXPERTS, "compilation": ONE_GRAPH}),
    "eager_off": Setting(EAGER),
    "eager_on": Setting(ALWAYS | EAGER, CHECK),
    "dense_eager_off": Setting(EAGER | {"config": DENSE}),
    "dense_eager_on": Setting(ALWAYS | EAGER | {"config": DENSE}, CHECK),
    "chunked_on": Setting(ALWAYS | EAGER | {"config": DENSE} | CHUNKED, CHECK),
    "speculative_on": Setting(ALWAYS | EAGER | {"config": DENSE} | SPECULATIVE, CHECK),
    "lora_on": Setting(ALWAYS | EAGER | {"config": DENSE, "enable_lora": True, "max_lora_rank": 8}, CHECK),
    "ranks_on": Setting(RANKS, {"NORMQUANT_ALL_REDUCE": "1"}),
    "ranks_without_switch": Setting(RANKS),
    "other_version": Setting({}, {"NORMQUANT": "1", "NORMQUANT_SHIM": "other_version"}, after="off"),
    "on_again": Setting(ALWAYS, {"NORMQUANT": "1"}, after="on"),
    "off_again": Setting({}, {"NORMQUANT": "0"}, after="on"),
}


@dataclass(frozen=True)
class Run:
    """An engine's last line, what it logged, the plugin's report when it ended, and the folder of its caches."""

    result: dict[str, Any]
    log: str
    report: str | None
    folder: Path

    @property
    def records(self) -> list[GraphRecord]:
        cache = self.result["cache"]  # None where nothing is compiled
        return list(read(Path(cache) / FILE if cache else find(self.folder / "vllm")[0]))

    @property
    def sites(self) -> list[dict[str, Any]]:
        return [site for record in self.records for site in record.report["sites"]]

    @property
    def says(self) -> list[str]:
        return [line for line in self.log.splitlines() if "normquant 0." in line or "normquant left" in line]


def run_engine(folder: Path, options: dict[str, Any], environ: dict[str, str]) -> Run:
    code, log = forked_engines.run(HERE / "engine.py", options, environ, folder, seconds=900)
    assert code == 0, log[-6000:]
    # The processes of other ranks may write after the engine's own line.
    result = json.loads(next(line for line in reversed(log.splitlines()) if line.startswith('{"calls"')))
    report = Path(result["cache"]) / FILE if result["cache"] else next(iter(find(folder / "vllm")), folder / FILE)
    said = log.replace(str(HERE.parents[1]), ".")  # a checkout's path may name normquant, which tests look for
    return Run(result, said, report.read_text() if report.exists() else None, folder)


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The environment of a process whose caches lie under a folder; but what vLLM finds out of a model's class, with a
    process that imports vLLM once more, is found out once."""
    models = tmp_path_factory.mktemp("modelinfos")

    def of(folder: Path) -> dict[str, str]:
        (folder / "vllm").mkdir(parents=True, exist_ok=True)
        link = folder / "vllm" / "modelinfos"
        if not link.exists():
            link.symlink_to(models)
        stock = {name: value for name, value in os.environ.items() if not name.startswith("NORMQUANT")}
        return {
            **stock,
            **ENVIRONMENT,
            "VLLM_CACHE_ROOT": str(folder / "vllm"),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE / "shims"), os.environ.get("PYTHONPATH")])),
        }

    return of


@pytest.fixture(scope="session", autouse=True)
def engines(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, environment: Environment
) -> Iterator[dict[str, Future[Run]]]:
    """The engines that the selected tests look at, and those that these go on from; a few of them run at once."""
    runs: dict[str, Future[Run]] = {}
    wanted = needed(request.session.items)
    base = tmp_path_factory.mktemp("engines")  # here, as mktemp is not for several threads

    def run(name: str) -> Run:
        setting = SETTINGS[name]
        folder = runs[setting.after].result().folder if setting.after else base / name
        folder.mkdir(exist_ok=True)
        environ = environment(folder) | IN_PROCESS | {"NORMQUANT_SHIM_OUT": str(folder)} | setting.environ
        return run_engine(folder, setting.options, environ)

    if wanted:
        forked_engines.start(environment(base) | IN_PROCESS)
    with ThreadPoolExecutor(min(4, len(os.sched_getaffinity(0)))) as pool:
        for name in SETTINGS:
            if name in wanted:
                runs[name] = pool.submit(run, name)
        yield runs
        pool.shutdown(cancel_futures=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put tests that wait for an engine behind those that start processes of their own."""
    items.sort(key=lambda item: item.path.is_relative_to(HERE) and bool(needed([item])))


def needed(items: list[pytest.Item]) -> set[str]:
    """The settings that tests name, and those that come before them."""
    names = {name for item in items for name in getattr(item, "fixturenames", ())} & SETTINGS.keys()
    while before := {SETTINGS[name].after for name in names if SETTINGS[name].after} - names:
        names |= before
    return names


def engine(name: str) -> Callable[..., Run]:
    @pytest.fixture(scope="session", name=name)
    def fixture(engines: dict[str, Future[Run]]) -> Run:
        return engines[name].result()

    return fixture


globals().update({name: engine(name) for name in SETTINGS})  # where pytest looks for fixtures
