"""`normquant bench vllm` as a command: its jobs, what it prints and what it writes."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import get_args

import pytest
from shared.vllm_jobs import FAKE, FOUND

from normquant.bench.vllm import supervisor
from normquant.bench.vllm.job import switches
from normquant.cli import bench as command
from normquant.cli import bench_vllm
from normquant.cli.arguments import POLICIES, PRODUCTS
from normquant.compile.policy import Policy, Products


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(["vllm", *words])


@pytest.fixture
def everything_there(monkeypatch) -> None:
    """What the command looks for: a GPU, vLLM, and code to audit."""
    monkeypatch.setattr(bench_vllm, "findings", lambda cache: FOUND)
    monkeypatch.setattr(command, "need_gpu", lambda count=1: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)


def test_groups_are_those_of_a_linear(tmp_path: Path):
    def names(*words: str) -> list[list[str]]:
        return [[j.name for j in group] for group in bench_vllm.groups(parsed(*words), tmp_path)]

    three = [f"{s}-deepgemm" for s in ("default", "off", "normquant")]
    assert names() == names("--as-installed") == [["installed", "installed-normquant"]]
    assert names("--linear", "deepgemm") == names("--settings", "default,off,normquant") == [three]
    assert names("--linear", "deepgemm,cutlass", "--settings", "off") == [["off-deepgemm"], ["off-cutlass"]]
    rules = ["installed", "installed-normquant", "installed-normquant-products-never"]
    assert names("--products", "auto,never") == [rules]
    assert names("--linear", "deepgemm", "--workers", "2") == [three[:2], three[2:]]
    both = [*three, *(f"{name}-moe" for name in three)]
    assert names("--linear", "deepgemm", "--moe", "0,4", "--workers", "6") == [both]
    jobs = [
        job for group in bench_vllm.groups(parsed("--linear", "deepgemm", "--moe", "0,4"), tmp_path) for job in group
    ]
    assert len({job.folder for job in jobs}) == 6 and [job.moe for job in jobs] == [0] * 3 + [4] * 3


@pytest.mark.parametrize(
    "words",
    [
        ("--settings", "on"),
        ("--linear", "triton"),
        ("--samples", "1"),
        ("--moe", "99"),
        ("--as-installed", "--linear", "cutlass"),
        ("--tensor-parallel", "3"),
        ("--all-reduce",),
        ("--products", "auto,some"),
    ],
)
def test_arguments_that_are_none(words: tuple[str, ...], tmp_path: Path):
    with pytest.raises(ValueError):
        bench_vllm.groups(parsed(*words), tmp_path)


def test_several_gpus_have_jobs_of_their_own(tmp_path: Path):
    ((without, ours),) = bench_vllm.groups(parsed("--tensor-parallel", "4", "--all-reduce"), tmp_path)
    assert (without.name, ours.name) == ("installed-tp4", "installed-normquant-tp4")
    assert without.tensor_parallel == ours.tensor_parallel == 4 and without.model["num_attention_heads"] == 64
    assert "NORMQUANT_ALL_REDUCE" in switches(ours, {}) and "NORMQUANT_ALL_REDUCE" not in switches(without, {})


def test_a_model_that_vllm_does_not_compile(tmp_path: Path):
    ((without, ours),) = bench_vllm.groups(parsed("--uncompiled"), tmp_path)
    assert (without.name, ours.name) == ("installed-uncompiled", "installed-normquant-uncompiled")
    assert not without.compiled and not ours.compiled


def test_the_command_writes_what_it_has_and_says_what_failed(tmp_path: Path, everything_there, monkeypatch, capsys):
    monkeypatch.setattr(supervisor, "COMMAND", FAKE)
    output = tmp_path / "records.jsonl"
    args = parsed("--batch", "1,16", "--output", str(output), "--keep", str(tmp_path / "kept"), "--settings", "off")
    assert command.run(args) == 0
    assert [json.loads(row)["batch"] for row in output.read_text().splitlines()] == [1, 16]
    out = capsys.readouterr().out
    assert "off deepgemm batch=16: 100.0 us a step" in out and "2 identity" in out


def test_a_process_that_fails_is_no_failed_check(tmp_path: Path, everything_there, monkeypatch, capsys):
    monkeypatch.setattr(supervisor, "COMMAND", (sys.executable, "-c", "raise SystemExit(1)"))
    output = tmp_path / "records.jsonl"
    output.write_text("old")
    assert command.run(parsed("--output", str(output), "--settings", "off")) == 2
    assert output.read_text() == "old" and list(tmp_path.iterdir()) == [output]
    assert "off-deepgemm failed starting" in capsys.readouterr().err


def test_the_policies_in_the_help_are_those_of_the_pass():
    assert get_args(Policy) == POLICIES and get_args(Products) == PRODUCTS
