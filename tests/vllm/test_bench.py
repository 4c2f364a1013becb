"""The process of `normquant bench vllm` with real vLLM on a CPU: the other tests' small model, and no kernel times."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from normquant.bench.records import VllmRecord
from normquant.bench.vllm.job import Job
from normquant.bench.vllm.supervisor import LOG, Failure, measure

Environment = Callable[[Path], dict[str, str]]
MODEL = runpy.run_path(str(Path(__file__).parent / "engine.py"))["MODEL"]
COMPILATION = {
    "cudagraph_mode": "NONE",
    "compile_sizes": [],
    "pass_config": {"fuse_norm_quant": False, "fuse_act_quant": False},
    "inductor_compile_config": {"emulate_precision_casts": True},
}
ENGINE = {"compilation_config": COMPILATION, "gpu_memory_utilization": 0.1}


def job(folder: Path, setting: str) -> Job:
    place = str(folder / setting)
    return Job(setting, "reference", 3, 0, (1, 2), (40,), 2, 3, 4, "always", place, MODEL, ENGINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def found(folder: Path, environment: Environment) -> Callable[[], list[VllmRecord | Failure]]:
    """Records without the plugin and with it, and of one that asks for a kernel that is not there."""

    def run() -> list[VllmRecord | Failure]:
        jobs = [job(folder, "off"), job(folder, "normquant")]
        refused = replace(job(folder, "default"), linear="deepgemm")
        with pytest.MonkeyPatch.context() as patch:
            for each in (*jobs, refused):
                for name, value in environment(Path(each.folder)).items():
                    patch.setenv(name, value)
            return list(measure([[*jobs, refused]], 500, lambda cache: {}))

    return cache(run)


def test_both_settings_decode_and_prefill(found: Callable[[], list[VllmRecord | Failure]]) -> None:
    records = [r for r in found() if isinstance(r, VllmRecord)]
    assert [(r.setting, r.batch) for r in records] == [(s, b) for s in ("off", "normquant") for b in (1, 2)], found()
    for record in records:
        assert record.tpot_ms > 0 and record.prefill_ms["40"] > 0
        assert record.gpu_us_per_step == 0 and record.kernels == 0  # there is no GPU


def test_the_logits_are_near_float32(found: Callable[[], list[VllmRecord | Failure]]) -> None:
    off, _, ours, _ = (r for r in found() if isinstance(r, VllmRecord))
    # quantizing to e4m3 moves a value by 2.6 % in the mean square: far from a wrong layer, and from no quantization
    assert 0.01 < off.logit_error < 0.08
    assert ours.logit_error == off.logit_error  # every site is exact on a CPU


def test_the_plugin_was_on_in_one_of_them(found: Callable[[], list[VllmRecord | Failure]], folder: Path) -> None:
    found()
    assert list((folder / "normquant" / "vllm").rglob("normquant.jsonl"))
    assert not list((folder / "off" / "vllm").rglob("normquant.jsonl"))


def test_another_linear_kernel_is_refused(found: Callable[[], list[VllmRecord | Failure]]) -> None:
    (failure,) = (f for f in found() if isinstance(f, Failure))
    assert failure.reason == "starting: ended with exit code 1" and failure.log
    log = (Path(failure.job.folder) / LOG).read_text()  # its end is what others print when the process exits
    assert "vLLM chose ReferenceBlockKernel for the linears, not deepgemm" in log
    assert json.loads((Path(failure.job.folder) / "job.json").read_text())["linear"] == "deepgemm"


@pytest.fixture
def no_shared_memory_left() -> Iterator[None]:
    """With an external launcher vLLM gives the memory that its ranks on a CPU share one name in every run, and fails on
    that of an earlier run whose processes were ended, as the measurement ends its own."""

    def forget() -> None:
        for left in Path("/dev/shm").glob("-tp:0-*-cpushm_*"):
            left.unlink(missing_ok=True)

    forget()
    yield
    forget()


@pytest.mark.usefixtures("no_shared_memory_left")
def test_ranks_stay_together_and_the_first_speaks(tmp_path: Path, environment: Environment) -> None:
    two = replace(job(tmp_path, "normquant"), tensor_parallel=2, all_reduce=True, batches=(2,), samples=2)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(Path(two.folder)).items():
            patch.setenv(name, value)
        (record,) = measure([[two]], 900, lambda cache: {})
    assert isinstance(record, VllmRecord), record
    assert (record.tensor_parallel, record.batch, record.replay_us) == (2, 2, None)  # nothing is captured on a CPU
    assert record.switches["NORMQUANT_ALL_REDUCE"] == "1" and record.logit_error < 0.2
    log = (Path(two.folder) / LOG).read_text()
    assert log.count("normquant") > 1 and list(Path(two.folder).glob("prefill-*-calls-rank1.txt"))
