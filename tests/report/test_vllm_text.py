"""Records of `normquant bench vllm` as text."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from shared.vllm_jobs import job, run

from normquant.report.vllm_text import line, summary


def test_vllm_as_installed_stands_beside_itself_with_normquant(tmp_path: Path):
    records = [asdict(r) for r in run([job(tmp_path, s) for s in ("installed", "installed-normquant")])]
    kernel = "FlashInferFp8DeepGEMMDynamicBlockScaledKernel"
    assert [r["linear"] for r in records] == [kernel] * 4 and all(r["switches"] == {} for r in records)
    for record in records:
        record["gpu_us_per_step"] *= {"installed": 1.0, "installed-normquant": 0.88}[record["setting"]]
    row = next(r for r in summary(records).splitlines() if " 1  installed-normquant" in r).split()
    assert row[4:8] == ["88.0", "-12.0", "%", "98.0"]


def test_several_gpus_are_compared_by_the_replayed_step(tmp_path: Path):
    jobs = [replace(job(tmp_path, s), tensor_parallel=4) for s in ("installed", "installed-normquant")]
    records = [asdict(r) for r in run(jobs)]
    assert all(r["tensor_parallel"] == 4 for r in records)
    for record in records:
        record["replay_us"] *= {"installed": 1.0, "installed-normquant": 0.9}[record["setting"]]
        record["gpu_us_per_step"] *= {"installed": 1.0, "installed-normquant": 2.0}[record["setting"]]
    text = summary(records)
    assert "TP4" in text and "-10.0 %" in text and "+100.0 %" not in text


def test_the_table_sets_settings_beside_each_other(tmp_path: Path):
    records = [asdict(r) for r in run([job(tmp_path, s) for s in ("default", "off", "normquant")])]
    for record in records:
        record["gpu_us_per_step"] *= {"default": 1.25, "off": 1.0, "normquant": 0.8}[record["setting"]]
    text = summary(records)
    row = next(r for r in text.splitlines() if r.startswith("deepgemm, experts      1  normquant")).split()
    assert row[4:] == ["80.0", "-36.0", "%", "-20.0", "%", "98.0", "41.0", "110.0", "300", "0.190", "40.0", "60.0"]
    assert "0 of 10" in text and "0.02000" in text and "9.50 (9.00)" in text
    assert line(records[0]).startswith("default deepgemm, experts batch=1: 125.0 us")
    assert summary([]) == "no records"
