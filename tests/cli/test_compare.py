"""`normquant compare`: what counts as slower, and what the exit code says."""

import json

import pytest

from normquant.cli.entry import main


def record(us: float, spread: float = 0.1, **other) -> dict:
    case = {"suite": "kernels", "op": "group_quant", "m": 1, "k": 128, "provider": "normquant", "gpu": "H100"}
    return case | {"us": us, "us_p10": us - spread, "us_p90": us + spread, "command": str(us)} | other


def write(path, records) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


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


BROKEN = {
    '{"suite": "kernels"}': "missing us",
    '{"suite": "vllm", "us_p10": 1, "us_p90": 1}': "missing gpu_us_per_step",
    '{"suite": "kernels", "us": NaN, "us_p10": 1, "us_p90": 1}': "not JSON: NaN is no number",
    '{"suite": "kernels", "us": 1e999, "us_p10": 1, "us_p90": 1}': "us is inf",
    '{"suite": "kernels", "us": true, "us_p10": 1, "us_p90": 1}': "us is True",
    '{"suite": "kernels", "us": "1", "us_p10": 1, "us_p90": 1}': "us is '1'",
    '{"suite": "kernels", "us": 0, "us_p10": 0, "us_p90": 1}': "us is 0",
    '{"suite": "poems", "us": 1}': "unknown suite 'poems'",
    '{"suite": ["kernels"]}': "not a record",
    "{": "not JSON",
    "\xff": "bytes that are no UTF-8",
}


@pytest.mark.parametrize(("line", "message"), BROKEN.items())
def test_a_broken_file_is_one_sentence_and_no_failed_check(tmp_path, capsys, line, message):
    good, bad = write(tmp_path / "a.jsonl", [record(1.0)]), tmp_path / "b.jsonl"
    bad.write_bytes(json.dumps(record(1.0)).encode() + b"\n" + line.encode("latin-1") + b"\n")
    for files in ((good, str(bad)), (str(bad), good)):
        assert main(["compare", *files, "--fail-if-slower", "5%"]) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert error.startswith(f"normquant: error: {bad}") and message in error


@pytest.mark.parametrize("text", ["much", "nan", "-1", "inf"])
def test_not_a_percentage(capsys, text):
    with pytest.raises(SystemExit, match="2"):
        main(["compare", "a", "b", "--fail-if-slower", text])
    assert f"{text!r} is not a percentage" in capsys.readouterr().err
