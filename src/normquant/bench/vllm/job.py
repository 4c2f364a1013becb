"""What one process of `normquant bench vllm` does: a setting of vLLM, a model, and what to measure on it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

INSTALLED = ("installed", "installed-normquant")  # vLLM as pip installs it, without and with the plugin
LABORATORY = ("default", "off", "normquant")  # with one linear kernel chosen for all of them
# What vLLM is told to leave alone; "unfused" is the model as it is written, whose numerics the plugin keeps.
PASSES = {
    "off": {"fuse_norm_quant": False},
    "unfused": {"fuse_norm_quant": False, "fuse_act_quant": False},
}
UNCOMPILED = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
LINEARS = ("deepgemm", "cutlass")
FLASHINFER_LINEAR = "VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER"
CHOICES = ("NORMQUANT", "NORMQUANT_ALL_REDUCE", FLASHINFER_LINEAR)  # not taken over from the environment
# How GPUs reach each other, on hosts that need it said; taken over from the environment, and kept in the record.
BETWEEN_GPUS = (
    "NCCL_NVLS_ENABLE",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST",
    "VLLM_ALLREDUCE_USE_SYMM_MEM",
    "VLLM_FLASHINFER_ALLREDUCE_BACKEND",
)
PROMPT = 64  # tokens of a request that is decoded
WARM_UP = 8  # steps before the first window
# What each process gets, whatever the caller's environment says: the engine inside the process, no network, and as
# little unmeasured start-up work as possible. None of it chooses a kernel of the model.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_DEEP_GEMM_WARMUP": "skip",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Job:
    """One setting on one model.

    setting: "installed", as pip installs vLLM, and "installed-normquant", the same with the plugin. In a laboratory,
        where FlashInfer's linear kernel is switched off: "default", else as it comes; "off", without its norm-quant
        fusion; "unfused", without that of silu either; "normquant", with the plugin.
    linear: in a laboratory the block-FP8 kernel that vLLM must choose, by the start of its name in lower case; else
        "installed", vLLM's own choice. layers, moe: of the model, and how many of them have experts.
    batches: requests decoded at once. prefill: lengths of prompts. samples: windows of `steps` steps each.
    compared: prompts whose logits are compared with those of float32.
    model: the model's config.json. engine: arguments of `vllm.LLM` that replace ours.
    tensor_parallel: GPUs that compute the model together. all_reduce: whether the plugin fuses their all-reduces.
    policy, products: the plugin's settings of these names.
    compiled: False for vLLM as it runs models that it does not compile, whose decode steps it captures as they are.
    """

    setting: str
    linear: str
    layers: int
    moe: int
    batches: tuple[int, ...]
    prefill: tuple[int, ...]
    samples: int
    steps: int
    compared: int
    policy: str
    folder: str
    model: Mapping[str, Any] = field(hash=False)
    engine: Mapping[str, Any] = field(default_factory=dict, hash=False)
    tensor_parallel: int = 1
    all_reduce: bool = False
    products: str = "auto"
    compiled: bool = True

    @property
    def name(self) -> str:
        """The job in logs and folders."""
        linear = "" if self.installed else f"-{self.linear}"
        ranks = f"-tp{self.tensor_parallel}" if self.tensor_parallel > 1 else ""
        rule = f"-products-{self.products}" if self.plugin and self.products != "auto" else ""
        return f"{self.setting}{rule}{linear}{'-moe' * (self.moe > 0)}{ranks}{'' if self.compiled else '-uncompiled'}"

    @property
    def installed(self) -> bool:
        """Whether nothing of the model is chosen for vLLM."""
        return self.setting in INSTALLED

    @property
    def plugin(self) -> bool:
        """Whether normquant is switched on."""
        return self.setting.endswith("normquant")

    @property
    def decoded(self) -> int:
        """Tokens that each request of a batch decodes: one window for each sample, and a margin."""
        return 1 + 2 * WARM_UP + self.samples * self.steps

    @property
    def longest(self) -> int:
        """Tokens of the longest request."""
        return max(PROMPT + self.decoded, *self.prefill, 256) + 64

    @property
    def cache(self) -> Path:
        """vLLM's own cache."""
        return Path(self.folder) / "vllm"


def write(job: Job) -> Path:
    """The job as a file in its folder, and the model's config beside it."""
    folder = Path(job.folder)
    (folder / "model").mkdir(parents=True, exist_ok=True)
    (folder / "model" / "config.json").write_text(json.dumps(job.model))
    path = folder / "job.json"
    path.write_text(json.dumps(asdict(job)))
    return path


def read(path: Path) -> Job:
    """The job that `write` wrote."""
    data = json.loads(path.read_text())
    return Job(**{**data, "batches": tuple(data["batches"]), "prefill": tuple(data["prefill"])})


def environment(job: Job, base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of the job's process: its own caches, except for the GEMMs', and the setting's switches only."""
    folder = Path(job.folder)
    found = {n: v for n, v in base.items() if n not in CHOICES and not n.startswith("VLLM_USE_DEEP_GEMM")}
    found |= ENVIRONMENT | switches(job, base)
    found["VLLM_CACHE_ROOT"] = str(job.cache)
    found["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    found["TRITON_CACHE_DIR"] = str(folder / "triton")
    found["DG_JIT_CACHE_DIR"] = str(folder.parent / "deep_gemm")  # the same GEMMs in every setting, minutes of nvcc
    if job.plugin:
        found["NORMQUANT"] = "1"
    return found


def switches(job: Job, base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What chooses kernels for vLLM, in a laboratory: of one GPU nothing for vLLM as it is installed."""
    found = {name: base[name] for name in BETWEEN_GPUS if name in base and job.tensor_parallel > 1}
    if job.plugin and job.all_reduce:
        found["NORMQUANT_ALL_REDUCE"] = "1"
    if job.installed:
        return found
    found[FLASHINFER_LINEAR] = "0"  # it would quantize inside
    if job.linear == "cutlass":  # vLLM prefers DeepGEMM anyway; asking for it by name would also move the experts to it
        found["VLLM_USE_DEEP_GEMM"] = "0"
    return found


def engine_arguments(job: Job) -> dict[str, Any]:
    """Arguments of `vllm.LLM`, except for how weights are loaded.

    The cache has a fixed size: several processes start on one GPU, where vLLM's way to find one would count the
    others' memory as its own.
    """
    from normquant.bench.vllm.seeded_model import cache_bytes  # which imports torch

    batch = max(job.batches)
    tokens = max(batch * (PROMPT + job.decoded + 64), job.longest)
    compilation: dict[str, Any] = {} if job.installed else {"cudagraph_capture_sizes": sorted(job.batches)}
    if not job.compiled:
        compilation |= UNCOMPILED
    if job.setting in PASSES:
        compilation["pass_config"] = dict(PASSES[job.setting])
    arguments: dict[str, Any] = {
        "model": str(Path(job.folder) / "model"),
        "skip_tokenizer_init": True,
        "max_model_len": job.longest,
        "max_num_seqs": batch,
        "max_num_batched_tokens": max(batch * PROMPT, *job.prefill, 2048),
        "dtype": "bfloat16",
        "seed": 0,
        "gpu_memory_utilization": 0.02,
        "kv_cache_memory_bytes": 5 * cache_bytes(dict(job.model), tokens) // 4 + (64 << 20),
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "compilation_config": compilation,
    }
    if job.plugin:
        arguments["additional_config"] = {"normquant": {"policy": job.policy, "products": job.products}}
    if job.tensor_parallel > 1:  # every rank is a process of ours, whose captured graph can be replayed
        arguments |= {"tensor_parallel_size": job.tensor_parallel, "distributed_executor_backend": "external_launcher"}
    return arguments | dict(job.engine)
