"""The parent of `normquant bench vllm`, with processes that only talk, and the records of what they say."""

from __future__ import annotations

import datetime
import json
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from shared.vllm_jobs import FOUND, job, run

from normquant.bench.record_files import problems
from normquant.bench.records import VllmRecord
from normquant.bench.vllm import supervisor as vllm
from normquant.bench.vllm.supervisor import Failure


def test_records_of_each_setting_and_batch(tmp_path: Path):
    found = run([job(tmp_path, s) for s in ("default", "off", "normquant")])
    assert [(r.setting, r.batch) for r in found if isinstance(r, VllmRecord)] == [
        (s, b) for s in ("default", "off", "normquant") for b in (1, 16)
    ]
    for record in found:
        assert problems(json.loads(json.dumps(asdict(record)))) == []
    assert found[0].prefill_ms == {"2048": 9.5} and found[0].tpot_ms == 0.19  # medians of five
    assert found[0].findings == FOUND and found[0].moe
    assert [r.policy for r in found] == ["", "", "", "", "well", "well"]
    assert [r.products for r in found] == ["", "", "", "", "auto", "auto"]
    assert {r.date for r in found} == {datetime.date.today().isoformat()}


def test_one_measures_at_a_time(tmp_path: Path):
    settings = ("default", "off", "normquant")
    run([job(tmp_path, s) for s in settings])
    turns = (tmp_path / "turns").read_text().splitlines()
    walls = [f"{s} wall" for s in settings] * 5
    assert turns == walls + [f"{s} {what}" for s in settings for what in ("begins", "ends")]


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
