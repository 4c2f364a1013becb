"""The committed measurements: every record fits the schema, and the README quotes them as they are."""

import re
from pathlib import Path

import pytest

from normquant.bench.compare import key
from normquant.bench.records import problems, read

ROOT = Path(__file__).parents[2]
RECORDS = list(read(ROOT / "baselines" / "h100.jsonl"))


def test_every_record_fits_the_schema():
    assert RECORDS
    for number, record in enumerate(RECORDS, 1):
        assert problems(record) == [], f"line {number}"


def test_no_case_is_there_twice():
    cases = [key(record) for record in RECORDS]
    assert len(cases) == len(set(cases))


def layers() -> dict[tuple[str, int, str], dict]:
    return {(r["model"], r["m"], r["setting"]): r for r in RECORDS if r["suite"] == "layer"}


def vllm() -> dict[str, dict[str, float]]:
    """README row -> setting -> GPU microseconds of the dense model with Cutlass, and the logits' error under ""."""
    rows: dict[str, dict[str, float]] = {}
    for r in RECORDS:
        if r["suite"] == "vllm" and r["linear"] == "cutlass" and not r["moe"]:
            rows.setdefault(f"batch {r['batch']}", {})[r["setting"]] = r["gpu_us_per_step"]
            for tokens, us in r["prefill_gpu_us"].items():
                rows.setdefault(f"prompt of {tokens}", {})[r["setting"]] = us
            rows.setdefault("", {})[r["setting"]] = r["logit_error"]
    return rows


def test_the_readme_quotes_vllm():
    text = (ROOT / "README.md").read_text()
    found = vllm()
    errors = found.pop("")
    assert len(found) == 5
    for name, us in found.items():
        default, off, ours = (us[setting] for setting in ("default", "off", "normquant"))
        cells = [f"{value:.1f}" for value in (default, off, ours)]
        cells += [f"{100 * (ours / other - 1):+.1f} %" for other in (default, off)]
        assert f"| {name} | {' | '.join(cells)} |" in text
    assert "{default:.4f}, {off:.4f} and {normquant:.4f}".format(**errors) in text


@pytest.mark.parametrize("model", sorted({r["model"] for r in RECORDS if r["suite"] == "layer"}))
def test_the_readme_quotes_the_layers(model):
    # | deepseek-r1 | 156.6 / 175.8 | ... : normquant / stock at M = 1, 16, 64, 1024, 8192
    row = re.search(rf"^\| {re.escape(model)} \|(.*)\|$", (ROOT / "README.md").read_text(), re.M)
    assert row, f"README.md has no row for {model}"
    cells = [cell.strip() for cell in row[1].split("|")]
    us = {key: f"{r['us']:.1f}" for key, r in layers().items()}
    expected = [f"{us[model, m, 'normquant']} / {us[model, m, 'stock']}" for m in (1, 16, 64, 1024, 8192)]
    assert cells == expected
