"""Jobs of `normquant bench vllm`, run by processes that only talk."""

from __future__ import annotations

import sys
from pathlib import Path

from normquant.bench.records import VllmRecord
from normquant.bench.vllm.job import Job
from normquant.bench.vllm.seeded_model import config
from normquant.bench.vllm.supervisor import Failure, measure

FAKE = (sys.executable, str(Path(__file__).parent / "vllm_fake_worker.py"))
FOUND = {"identity": 2}


def job(folder: Path, setting: str = "off", policy: str = "well", linear: str = "deepgemm") -> Job:
    return Job(setting, linear, 4, 1, (1, 16), (2048,), 5, 32, 8, policy, str(folder / setting), config(4, 1))


def run(*groups: list[Job], timeout: float = 60) -> list[VllmRecord | Failure]:
    return list(measure(groups, timeout, lambda cache: FOUND, FAKE))
