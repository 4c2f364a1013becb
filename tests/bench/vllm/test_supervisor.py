"""The driver of `normquant bench vllm` with processes that only talk, its jobs, its records and its tables."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from normquant.bench.records import VllmRecord, problems
from normquant.bench.vllm import supervisor as vllm
from normquant.bench.vllm.job import Job, engine_arguments, environment, read, write
from normquant.bench.vllm.seeded_model import config
from normquant.bench.vllm.supervisor import Failure, measure
from normquant.cli import bench as command
from normquant.report.vllm_text import line, summary

FAKE = (sys.executable, str(Path(__file__).parents[2] / "shared" / "vllm_fake_worker.py"))
FOUND = {"identity": 2}


def job(folder: Path, setting: str = "off", policy: str = "well", linear: str = "deepgemm") -> Job:
    return Job(setting, linear, 4, 1, (1, 16), (2048,), 5, 32, 8, policy, str(folder / setting), config(4, 1))


def run(*groups: list[Job], timeout: float = 60) -> list[VllmRecord | Failure]:
    return list(measure(groups, timeout, lambda cache: FOUND, FAKE))


def test_records_of_each_setting_and_batch(tmp_path: Path):
    found = run([job(tmp_path, s) for s in ("default", "off", "normquant")])
    assert [(r.setting, r.batch) for r in found if isinstance(r, VllmRecord)] == [
        (s, b) for s in ("default", "off", "normquant") for b in (1, 16)
    ]
    for record in found:
        assert problems(json.loads(json.dumps(asdict(record)))) == []
    assert found[0].prefill_ms == {"2048": 9.5} and found[0].findings == FOUND and found[0].moe
    assert [r.policy for r in found] == ["", "", "", "", "well", "well"]


def test_one_measures_at_a_time(tmp_path: Path):
    settings = ("default", "off", "normquant")
    run([job(tmp_path, s) for s in settings])
    turns = (tmp_path / "turns").read_text().splitlines()
    assert turns == [f"{s} {what}" for s in settings for what in ("begins", "ends")]


@pytest.mark.parametrize(
    ("policy", "reason", "log"),
    [
        ("dies", "starting: ended with exit code 1", "starting default\nout of memory"),
        ("dies later", "measuring: ended with exit code 1", "starting default\nillegal memory access"),
    ],
)
def test_the_rest_goes_on_without_one_that_dies(tmp_path: Path, policy: str, reason: str, log: str):
    found = run([job(tmp_path, "default", policy), job(tmp_path, "off")])
    (failure,) = (f for f in found if isinstance(f, Failure))
    assert (failure.job.setting, failure.reason, failure.log) == ("default", reason, log)
    assert [r.setting for r in found if isinstance(r, VllmRecord)] == ["off", "off"]


def test_one_that_hangs_is_ended(tmp_path: Path):
    start = time.monotonic()
    found = run([job(tmp_path, "default", "hangs")], [job(tmp_path, "off")], timeout=4)
    assert [type(f) for f in found] == [Failure, VllmRecord, VllmRecord]
    assert found[0].reason == "starting: took longer than --timeout"
    assert time.monotonic() - start < 60


def test_what_is_no_message_is_passed_over(tmp_path: Path):
    assert len(run([job(tmp_path, policy="chats")])) == 2


def test_no_process_outlives_an_interruption(tmp_path: Path, monkeypatch):
    started: list[vllm.WorkerProcess] = []

    def interrupted(process: vllm.WorkerProcess, deadline: float) -> dict:
        raise KeyboardInterrupt

    worker = vllm.WorkerProcess
    monkeypatch.setattr(worker, "message", interrupted)
    original = worker.__init__
    monkeypatch.setattr(worker, "__init__", lambda self, *args: (original(self, *args), started.append(self))[0])
    with pytest.raises(KeyboardInterrupt):
        run([job(tmp_path, "default"), job(tmp_path, "off", "hangs")])
    assert len(started) == 2 and all(p._process.poll() is not None for p in started)


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
    assert ours.pop("additional_config") == {"normquant": {"policy": "well"}}
    for arguments in (default, off, ours):
        del arguments["model"]
    assert default == off == ours


def test_every_request_fits(tmp_path: Path):
    one = job(tmp_path)
    arguments = engine_arguments(one)
    assert arguments["max_model_len"] > 2048 and arguments["max_num_batched_tokens"] >= 2048
    per_token = 2 * 4 * (512 + 64)  # bytes, layers, latent and RoPE
    assert arguments["kv_cache_memory_bytes"] > per_token * 16 * (64 + one.decoded)
    assert one.decoded > 5 * 32


@pytest.mark.parametrize(("layers", "moe"), [(4, 0), (4, 4), (16, 4)])
def test_the_last_layers_have_experts(layers: int, moe: int):
    model = config(layers, moe)
    assert (model["num_hidden_layers"], model["first_k_dense_replace"]) == (layers, layers - moe)


@pytest.mark.parametrize(("layers", "moe"), [(4, 5), (4, -1), (0, 0)])
def test_more_experts_than_layers_are_refused(layers: int, moe: int):
    with pytest.raises(ValueError, match="layers with experts"):
        config(layers, moe)


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(["vllm", *words])


def test_groups_are_those_of_a_linear(tmp_path: Path):
    def names(*words: str) -> list[list[str]]:
        return [[j.name for j in group] for group in command.vllm_groups(parsed(*words), tmp_path)]

    three = [f"{s}-deepgemm" for s in ("default", "off", "normquant")]
    assert names() == [three]
    assert names("--linear", "deepgemm,cutlass", "--settings", "off") == [["off-deepgemm"], ["off-cutlass"]]
    assert names("--workers", "2") == [three[:2], three[2:]]
    both = [*three, *(f"{name}-moe" for name in three)]
    assert names("--moe", "0,4", "--workers", "6") == [both]
    jobs = [job for group in command.vllm_groups(parsed("--moe", "0,4"), tmp_path) for job in group]
    assert len({job.folder for job in jobs}) == 6 and [job.moe for job in jobs] == [0] * 3 + [4] * 3


@pytest.mark.parametrize("words", [("--settings", "on"), ("--linear", "triton"), ("--samples", "1"), ("--moe", "99")])
def test_arguments_that_are_none(words: tuple[str, ...], tmp_path: Path):
    with pytest.raises(ValueError):
        command.vllm_groups(parsed(*words), tmp_path)


def test_the_command_writes_what_it_has_and_says_what_failed(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(vllm, "COMMAND", FAKE)
    monkeypatch.setattr(command, "findings", lambda cache: FOUND)
    monkeypatch.setattr(command, "need_gpu", lambda: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    output = tmp_path / "records.jsonl"
    args = parsed("--batch", "1,16", "--output", str(output), "--keep", str(tmp_path / "kept"), "--settings", "off")
    assert command.run(args) == 0
    assert [json.loads(row)["batch"] for row in output.read_text().splitlines()] == [1, 16]
    out = capsys.readouterr().out
    assert "off deepgemm batch=16: 100.0 us a step" in out and "2 identity" in out


def test_the_table_sets_settings_beside_each_other(tmp_path: Path):
    records = [asdict(r) for r in run([job(tmp_path, s) for s in ("default", "off", "normquant")])]
    for record in records:
        record["gpu_us_per_step"] *= {"default": 1.25, "off": 1.0, "normquant": 0.8}[record["setting"]]
    text = summary(records)
    row = next(r for r in text.splitlines() if r.startswith("deepgemm, experts      1  normquant")).split()
    assert row[4:] == ["80.0", "-36.0", "%", "-20.0", "%", "110.0", "300", "0.200", "40.0", "60.0"]
    assert "0 of 10" in text and "0.02000" in text and "9.50 (9.00)" in text
    assert line(records[0]).startswith("default deepgemm, experts batch=1: 125.0 us")
    assert summary([]) == "no records"


def test_classes_have_to_add_up(tmp_path: Path):
    record = asdict(run([job(tmp_path)])[0])
    assert problems(record | {"classes": {"gemm": 90.0}}) == ["classes do not add up to gpu_us_per_step"]
    assert problems(record | {"classes": {"gemm": "x"}}) == ["classes is {'gemm': 'x'}"]
    assert problems(record | {"us_p90": 1.0}) == ["gpu_us_per_step is outside of us_p10 .. us_p90"]
