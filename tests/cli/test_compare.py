"""`normquant compare`: what counts as slower, and what the exit code says."""

import json

import pytest

from normquant.cli.compare import compare
from normquant.cli.entry import main


def record(us: float, spread: float = 0.1, **other) -> dict:
    case = {"suite": "kernels", "op": "group_quant", "m": 1, "k": 128, "provider": "normquant", "gpu": "H100"}
    return case | {"us": us, "us_p10": us - spread, "us_p90": us + spread, "command": str(us)} | other


def write(path, records) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


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


@pytest.mark.parametrize(
    ("before", "after", "spread", "code"),
    [(1.0, 1.2, 0.01, 1), (1.0, 1.04, 0.001, 0), (1.0, 1.2, 0.2, 0), (1.2, 1.0, 0.01, 0)],
    ids=["slower", "slower by less than the limit", "within the spread", "faster"],
)
def test_fail_if_slower(tmp_path, capsys, before, after, spread, code):
    a = write(tmp_path / "a.jsonl", [record(before, spread)])
    b = write(tmp_path / "b.jsonl", [record(after, spread)])
    assert main(["compare", a, b, "--fail-if-slower", "5%"]) == code
    assert ("SLOWER" in capsys.readouterr().out) == bool(code)


def test_nothing_in_common_is_an_error(tmp_path, capsys):
    a = write(tmp_path / "a.jsonl", [record(1.0)])
    assert main(["compare", a, write(tmp_path / "b.jsonl", [record(1.0, m=3)])]) == 2
    assert "no case of provider 'normquant' in common" in capsys.readouterr().err


def test_not_a_percentage(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["compare", "a", "b", "--fail-if-slower", "much"])
    assert "'much' is not a percentage" in capsys.readouterr().err
