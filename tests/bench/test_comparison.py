"""Records of two files beside each other: what is one case, and what changed."""

import pytest

from normquant.bench.comparison import compare


def record(us: float, **other) -> dict:
    case = {"suite": "kernels", "op": "group_quant", "m": 1, "k": 128, "provider": "normquant", "gpu": "H100"}
    return case | {"us": us, "us_p10": us - 0.1, "us_p90": us + 0.1, "command": str(us)} | other


def test_cases_are_matched_by_everything_that_is_not_measured():
    changes, gone, added = compare([record(1.0), record(1.0, m=2)], [record(2.0), record(1.0, m=4)])
    assert [(c.ratio, c.separate) for c in changes] == [(2.0, True)]
    assert (gone, added) == (1, 1)


def test_steps_of_vllm_are_compared_too():
    step = {"suite": "vllm", "setting": "normquant", "linear": "deepgemm", "layers": 16, "moe": False, "batch": 1}
    before, after = (
        step | {"gpu_us_per_step": v, "us_p10": v, "us_p90": v, "classes": {"gemm": v}} for v in (9.0, 12.0)
    )
    (change,), *_ = compare([before], [after, after | {"batch": 16}])
    assert change.ratio == pytest.approx(4 / 3) and change.case == "normquant deepgemm batch=1"


def test_products_and_numbers_of_gpus_are_cases_and_older_records_have_the_defaults():
    old = record(1.0, suite="vllm")
    for other in ({"products": "never"}, {"tensor_parallel": 4}, {"compiled": False}):
        changes, gone, added = compare([old], [old | {"products": "auto", "tensor_parallel": 1}, old | other])
        assert (len(changes), gone, added) == (1, 0, 1)
