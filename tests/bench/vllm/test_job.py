"""Jobs of `normquant bench vllm`: what a process is told, and the arguments that vLLM gets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from shared.vllm_jobs import job

from normquant.bench.vllm.job import engine_arguments, environment, read, switches, write


def test_a_job_is_the_same_after_a_file(tmp_path: Path):
    before = replace(job(tmp_path), engine={"seed": 1})
    path = write(before)
    assert read(path) == before and read(path).engine == before.engine
    assert json.loads((path.parent / "model" / "config.json").read_text()) == before.model


def test_each_setting_has_its_own_environment(tmp_path: Path):
    base = {"NORMQUANT": "1", "VLLM_USE_DEEP_GEMM": "1", "VLLM_CACHE_ROOT": "/x", "PATH": "/bin"}
    default, ours = environment(job(tmp_path), base), environment(job(tmp_path, "normquant"), base)
    assert "NORMQUANT" not in default and ours["NORMQUANT"] == "1"
    # asked for by name, DeepGEMM would also take the experts; left alone, vLLM takes it for the linears
    assert "VLLM_USE_DEEP_GEMM" not in default
    assert environment(job(tmp_path, linear="cutlass"), base)["VLLM_USE_DEEP_GEMM"] == "0"
    assert default["PATH"] == "/bin" and default["VLLM_CACHE_ROOT"] != ours["VLLM_CACHE_ROOT"]
    assert default["DG_JIT_CACHE_DIR"] == ours["DG_JIT_CACHE_DIR"] == str(tmp_path / "deep_gemm")


def test_settings_differ_in_one_thing(tmp_path: Path):
    default, off, ours = (engine_arguments(job(tmp_path, s)) for s in ("default", "off", "normquant"))
    assert "pass_config" not in default["compilation_config"] and "additional_config" not in default
    unfused = engine_arguments(job(tmp_path, "unfused"))["compilation_config"]["pass_config"]
    assert unfused == {"fuse_norm_quant": False, "fuse_act_quant": False}
    assert off["compilation_config"].pop("pass_config") == {"fuse_norm_quant": False}
    assert ours.pop("additional_config") == {"normquant": {"policy": "well", "products": "auto"}}
    for arguments in (default, off, ours):
        del arguments["model"]
    assert default == off == ours


def test_nothing_is_chosen_for_vllm_as_it_is_installed(tmp_path: Path):
    base = {"VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER": "0", "VLLM_USE_DEEP_GEMM": "0", "NORMQUANT": "1"}
    without, ours = (job(tmp_path, s, linear="installed") for s in ("installed", "installed-normquant"))
    assert switches(without) == switches(ours) == {}
    a, b = environment(without, base), environment(ours, base)
    assert "VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER" not in a and "VLLM_USE_DEEP_GEMM" not in a and "NORMQUANT" not in a
    assert b["NORMQUANT"] == "1" and set(b) - set(a) == {"NORMQUANT"}
    assert engine_arguments(without)["compilation_config"] == {}  # vLLM's own sizes of CUDA graphs, too
    assert switches(job(tmp_path)) == {"VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER": "0"}


def test_every_request_fits(tmp_path: Path):
    one = job(tmp_path)
    arguments = engine_arguments(one)
    assert arguments["max_model_len"] > 2048 and arguments["max_num_batched_tokens"] >= 2048
    per_token = 2 * 4 * (512 + 64)  # bytes, layers, latent and RoPE
    assert arguments["kv_cache_memory_bytes"] > per_token * 16 * (64 + one.decoded)
    assert one.decoded > 5 * 32


def test_several_gpus_are_ranks_of_our_own_and_say_how_they_reach_each_other(tmp_path: Path):
    one = job(tmp_path, "installed-normquant", linear="installed")
    four = replace(one, tensor_parallel=4, all_reduce=True)
    base = {"NCCL_NVLS_ENABLE": "0", "NORMQUANT_ALL_REDUCE": "1"}
    assert switches(one, base) == {} and "NORMQUANT_ALL_REDUCE" not in environment(one, base)
    assert switches(four, base) == {"NCCL_NVLS_ENABLE": "0", "NORMQUANT_ALL_REDUCE": "1"}
    assert environment(replace(four, setting="installed"), base).get("NORMQUANT_ALL_REDUCE") is None
    assert four.name == f"{one.name}-tp4" and read(write(four)) == four
    arguments = engine_arguments(four)
    assert arguments["tensor_parallel_size"] == 4 and arguments["distributed_executor_backend"] == "external_launcher"
    assert "tensor_parallel_size" not in engine_arguments(one)


def test_a_model_that_vllm_does_not_compile_is_captured_as_it_is(tmp_path: Path):
    one = replace(job(tmp_path, "installed", linear="installed"), compiled=False)
    assert engine_arguments(one)["compilation_config"] == {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    assert one.name == f"{replace(one, compiled=True).name}-uncompiled" and read(write(one)) == one
    assert switches(one) == {}
