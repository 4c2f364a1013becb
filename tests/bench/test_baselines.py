"""The committed measurements: every record fits the schema, and the README quotes them as they are."""

import re
import statistics
from pathlib import Path

import pytest

from normquant.bench.cases import BENCHMARKED, kernel_cases
from normquant.bench.records import problems, read
from normquant.cli.compare import key

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


PEERS = ("vllm fused", "vllm unfused", "flashinfer", "flashinfer pdl", "torch.compile")
MODELS = {("deepgemm", False): "DeepGEMM", ("deepgemm", True): "DeepGEMM, experts", ("cutlass", False): "Cutlass"}


def kernels() -> dict[tuple[str, bool, int, int], dict[str, float]]:
    """(op, normed, m, k) -> provider -> microseconds."""
    found: dict[tuple[str, bool, int, int], dict[str, float]] = {}
    for r in RECORDS:
        if r["suite"] == "kernels" and r["inputs"] == "dram":
            found.setdefault((r["op"], r["normed"], r["m"], r["k"]), {})[r["provider"]] = r["us"]
    return found


def test_the_grid_is_whole():
    assert kernels().keys() == {(c.op, c.normed, c.m, c.k) for c in kernel_cases(BENCHMARKED)}
    assert {r["match"] for r in RECORDS if r.get("provider") == "normquant"} == {"bitwise"}


def test_the_readme_quotes_the_kernels():
    text, found = (ROOT / "README.md").read_text(), kernels()
    for m in (1, 16, 64, 256, 1024, 8192):
        us = found["add_rms_norm_quant", False, m, 7168]
        normed = found["add_rms_norm_quant", True, m, 7168]
        cells = [us[p] for p in ("normquant", "vllm fused", "vllm unfused", "torch.compile")]
        cells += [normed[p] for p in ("normquant", "flashinfer pdl")]
        assert f"| {m} | {' | '.join(f'{value:.2f}' for value in cells)} |" in text
    gains, slower = [], []
    for us in found.values():
        peers = {p: us[p] for p in PEERS if p in us}
        if peers:
            best = min(peers, key=peers.__getitem__)
            gains.append(peers[best] / us["normquant"])
            slower += [best] * (gains[-1] < 1)
    assert [name.partition(" ")[0] for name in slower] == ["flashinfer"]
    words = " ".join(text.split())
    assert f"all {len(gains)} cases" in words and f"{statistics.geometric_mean(gains):.2f} times as fast" in words
    assert f"{min(gains):.3f} times in the worst, the only one below 1" in words


def vllm() -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """README row -> setting -> GPU microseconds, and model -> setting -> the logits' error."""
    rows: dict[str, dict[str, float]] = {}
    errors: dict[str, dict[str, float]] = {}
    for r in RECORDS:
        if r["suite"] == "vllm":
            model = MODELS[r["linear"], r["moe"]]
            rows.setdefault(f"{model}, batch {r['batch']}", {})[r["setting"]] = r["gpu_us_per_step"]
            for tokens, us in r["prefill_gpu_us"].items():
                rows.setdefault(f"{model}, prompt of {tokens}", {})[r["setting"]] = us
            errors.setdefault(model, {})[r["setting"]] = r["logit_error"]
    return rows, errors


def test_the_readme_quotes_vllm():
    text = (ROOT / "README.md").read_text()
    found, errors = vllm()
    assert len(found) == 15
    for name, us in found.items():
        default, off, ours = (us[setting] for setting in ("default", "off", "normquant"))
        cells = [f"{value:.1f}" for value in (default, off, ours)]
        cells += [f"{100 * (ours / other - 1):+.1f} %" for other in (default, off)]
        assert f"| {name} | {' | '.join(cells)} |" in text
    words = " ".join(text.split())
    for name, error in errors.items():
        quoted = "{default:.4f}, {off:.4f} and {normquant:.4f}".format(**error)
        assert f"{name.replace('DeepGEMM, experts', 'with experts')} {quoted}" in words


@pytest.mark.parametrize("model", sorted({r["model"] for r in RECORDS if r["suite"] == "layer"}))
def test_the_readme_quotes_the_layers(model):
    # | deepseek-r1 | 156.6 / 175.8 | ... : normquant / stock at M = 1, 16, 64, 1024, 8192
    row = re.search(rf"^\| {re.escape(model)} \|(.*)\|$", (ROOT / "README.md").read_text(), re.M)
    assert row, f"README.md has no row for {model}"
    cells = [cell.strip() for cell in row[1].split("|")]
    us = {key: f"{r['us']:.1f}" for key, r in layers().items()}
    expected = [f"{us[model, m, 'normquant']} / {us[model, m, 'stock']}" for m in (1, 16, 64, 1024, 8192)]
    assert cells == expected
