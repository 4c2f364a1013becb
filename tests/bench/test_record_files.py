"""Files of records: their schema, and that they are written whole or not at all."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from shared.vllm_jobs import job, run

from normquant.bench.record_files import problems, read, writing
from normquant.bench.records import KernelRecord, LayerRecord, timing_fields
from normquant.bench.timing import Timing

RUN = {"gpu": "an H100", "torch": "2.11.0", "triton": "3.6.0", "version": "0.1.0", "command": "normquant bench kernels"}
CASE = dict(suite="kernels", op="group_quant", m=1, k=128, group=128, layout="row", scale="fp32", residual=False)
RECORD = KernelRecord(
    **CASE,
    normed=False,
    provider="normquant",
    inputs="dram",
    **timing_fields(Timing(2.0, 1.5, 2.5, 9), 4000),
    pct_of_copy=None,
    match="bitwise",
    **RUN,
)


def as_dict(record) -> dict:
    return json.loads(json.dumps(record.__dict__))


def test_a_record_has_no_problems():
    assert problems(as_dict(RECORD)) == []
    assert RECORD.gbps == 2.0  # 4000 bytes in 2 microseconds


def test_a_record_of_several_ranks_has_their_number():
    assert problems(as_dict(RECORD) | {"ranks": 4}) == []
    assert problems(as_dict(RECORD) | {"ranks": "4"}) == ["ranks is '4'"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"us": "2"}, "us is '2'"),
        ({"us": 9.0}, "us is outside of us_p10 .. us_p90"),
        ({"gbps": 3.0}, "gbps is not bytes / us"),
        ({"extra": 1}, "unknown extra"),
        ({"suite": "poems"}, "unknown suite 'poems'; known: kernels, linear, decode, layer, vllm"),
    ],
)
def test_problems_are_named(change, problem):
    assert problems(as_dict(RECORD) | change) == [problem]


def test_missing_fields_are_named():
    record = as_dict(RECORD)
    del record["k"], record["us"]
    assert problems(record) == ["missing k", "missing us"]


def test_an_interrupted_run_keeps_its_part(tmp_path: Path):
    path = tmp_path / "records.jsonl"
    path.write_text("before\n")
    with pytest.raises(KeyboardInterrupt), writing(path) as add:
        add([RECORD])
        raise KeyboardInterrupt
    assert path.read_text() == "before\n"
    (kept,) = read(tmp_path / "records.jsonl.part")
    assert kept == as_dict(RECORD) and next(iter(kept)) == "suite" and list(kept)[-6:] == [*RUN, "date"]
    with writing(path) as add:
        add([RECORD, replace(RECORD, m=2)])
    assert [r["m"] for r in read(path)] == [1, 2]


def test_a_run_that_measured_nothing_leaves_nothing(tmp_path: Path):
    with pytest.raises(ValueError), writing(tmp_path / "records.jsonl"):
        raise ValueError("no such op")
    assert list(tmp_path.iterdir()) == []
    with writing(None) as add:
        add([RECORD])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["{", "3", '{"us": 1}'])
def test_a_line_that_is_no_record_is_named(tmp_path: Path, text: str):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(as_dict(RECORD)) + "\n" + text + "\n")
    with pytest.raises(ValueError, match=r"x\.jsonl:2: not "):
        list(read(path))


def test_layer_records_have_a_schema_too():
    record = LayerRecord("layer", "deepseek-r1", "stock", 1, 2.0, 1.0, 3.0, 9, 12, **RUN)
    assert problems(as_dict(record)) == []
    assert problems(as_dict(record) | {"kernels": 1.5}) == ["kernels is 1.5"]


def test_classes_have_to_add_up(tmp_path: Path):
    record = asdict(run([job(tmp_path)])[0])
    assert problems(record | {"classes": {"gemm": 90.0}}) == ["classes do not add up to gpu_us_per_step"]
    assert problems(record | {"classes": {"gemm": "x"}}) == ["classes is {'gemm': 'x'}"]
    assert problems(record | {"us_p90": 1.0}) == ["gpu_us_per_step is outside of us_p10 .. us_p90"]
