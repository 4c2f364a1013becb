"""Records of `normquant bench vllm` as text."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from shared.vllm_jobs import job, run

from normquant.report.vllm_text import line, summary


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
