"""The committed measurements: every record fits the schema, and the docs quote them as they are."""

import re
import statistics
from functools import partial
from pathlib import Path

import pytest
from shared import pages
from shared.pages import row, table, words

from normquant.bench.cases import BENCHMARKED, kernel_cases
from normquant.bench.comparison import key
from normquant.bench.record_files import problems, read
from normquant.compile.policy import UNMEASURED

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PERFORMANCE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
FILES = sorted((ROOT / "baselines").glob("*.jsonl"))
RECORDS = list(read(ROOT / "baselines" / "h100.jsonl"))
H100_VLLM = list(read(ROOT / "baselines" / "h100-vllm-0.26.jsonl"))
H200_26 = list(read(ROOT / "baselines" / "h200-vllm-0.26.jsonl"))
H100_33 = list(read(ROOT / "baselines" / "h100-vllm-0.33.jsonl"))
H200_33 = list(read(ROOT / "baselines" / "h200-vllm-0.33.jsonl"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_record_fits_the_schema(path):
    records = list(read(path))
    assert records
    for number, record in enumerate(records, 1):
        assert problems(record) == [], f"line {number}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_case_is_there_twice(path):
    cases = [key(record) for record in read(path)]
    assert len(cases) == len(set(cases))


MEASURED = tuple(op for op in BENCHMARKED if op not in UNMEASURED)
PEERS = ("vllm fused", "vllm unfused", "flashinfer", "flashinfer pdl", "torch.compile")
MODELS = {"DeepGEMM": ("deepgemm", False), "DeepGEMM, experts": ("deepgemm", True), "Cutlass": ("cutlass", False)}
INSTALLED = {  # title -> records, whether there are experts, whether vLLM compiles the model
    "As installed, dense layers": (H200_26, False, True),
    "As installed, experts": (H200_26, True, True),
    "vLLM 0.33, dense layers": (H200_33, False, True),
    "Not compiled, vLLM 0.26": (H100_VLLM, False, False),
    "Not compiled, vLLM 0.33": (H100_33, False, False),
    "The same on an H100, a version earlier": (H100_VLLM, False, True),
}
SETTINGS = ("default", "off", "normquant")
LABORATORY = ("`VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER=0`", "one GPU", "no all-reduce")
COMPILED = "torch.compile 2.11 with dynamic rows"


def kernels() -> dict[tuple[str, bool, int, int], dict[str, dict]]:
    """(op, normed, m, k) -> provider -> record."""
    found: dict[tuple[str, bool, int, int], dict[str, dict]] = {}
    for r in RECORDS:
        if r["suite"] == "kernels" and r["inputs"] == "dram":
            found.setdefault((r["op"], r["normed"], r["m"], r["k"]), {})[r["provider"]] = r
    return found


def layers() -> dict[tuple[str, int, str], dict]:
    return {(r["model"], r["m"], r["setting"]): r for r in RECORDS if r["suite"] == "layer"}


def vllm(model: str) -> list[dict]:
    """The records of a table of docs/performance.md."""
    return [r for r in RECORDS if r["suite"] == "vllm" and (r["linear"], r["moe"]) == MODELS[model]]


section = partial(pages.section, PERFORMANCE)


def change(ours: float, other: float) -> str:
    return f"{100 * (ours / other - 1):+.1f} %"


def test_the_grid_is_whole():
    assert kernels().keys() == {(c.op, c.normed, c.m, c.k) for c in kernel_cases(MEASURED)}
    assert {r["match"] for r in RECORDS if r["suite"] == "kernels" and r["provider"] == "normquant"} == {"bitwise"}


def test_the_kernels_are_quoted():
    found = kernels()
    header, *rows = table(section("Kernels"))
    assert "| torch.compile 2.11, dynamic rows |" in header
    expected = []
    for m in (1, 16, 64, 256, 1024, 8192):
        plain, normed = (found["add_rms_norm_quant", with_norm, m, 7168] for with_norm in (False, True))
        us = [plain[p]["us"] for p in ("normquant", "vllm fused", "vllm unfused", "torch.compile")]
        us += [normed[p]["us"] for p in ("normquant", "flashinfer pdl")]
        expected.append(row(m, *(f"{value:.2f}" for value in us)))
    assert rows == expected


def test_the_summary_of_the_kernels_is_quoted():
    gains, slower = [], {}
    for case, found in kernels().items():
        peers = {p: found[p]["us"] for p in PEERS if p in found}
        if peers:
            best = min(peers, key=peers.__getitem__)
            gains.append(peers[best] / found["normquant"]["us"])
            if gains[-1] < 1:
                slower[case] = [found["normquant"], found[best]]
    mean = f"{statistics.geometric_mean(gains):.2f} times as fast"
    page, readme = words(section("Kernels")), words(README)
    assert f"all {len(gains)} cases" in page and mean in page
    assert f"{min(gains):.3f} times in the worst, the only one below 1: 16384 rows of K = 7168 with the norm" in page
    assert f"{len(gains)} cases" in readme and mean in readme and f"{min(gains):.3f} times in the worst case" in readme
    ((case, both),) = slower.items()
    assert case == ("add_rms_norm_quant", True, 16384, 7168) and both[1]["provider"] == "flashinfer"
    assert {f"{r['pct_of_copy']:.0f} %" for r in both} == {"97 %"} and "both reach 97 % of the bandwidth" in page


def test_the_layers_are_quoted():
    us = {key: f"{r['us']:.1f}" for key, r in layers().items()}
    header, *rows = table(section("Layers"))
    sizes = (1, 16, 64, 1024, 8192)
    assert header == row("model", *sizes) and f"normquant / {COMPILED}" in words(section("Layers"))
    models = dict.fromkeys(model for model, _, _ in layers())
    assert sorted(rows) == sorted(
        row(model, *(f"{us[model, m, 'normquant']} / {us[model, m, 'stock']}" for m in sizes)) for model in models
    )


def vllm_rows(model: str) -> list[str]:
    """The rows of a vLLM table: GPU time by setting, both changes, wall time by setting."""
    times: dict[str, dict[str, tuple[float, float]]] = {}
    for r in vllm(model):
        times.setdefault(f"batch {r['batch']}", {})[r["setting"]] = (r["gpu_us_per_step"], r["tpot_ms"])
        for tokens, us in r["prefill_gpu_us"].items():
            times.setdefault(f"prompt of {tokens}", {})[r["setting"]] = (us, r["prefill_ms"][tokens])
    found = []
    for name, by_setting in times.items():
        (default, off, ours), wall = zip(*(by_setting[setting] for setting in SETTINGS), strict=True)
        gpu = (f"{us:.1f}" for us in (default, off, ours))
        ms = " / ".join(f"{value:.2f}" for value in wall)
        found.append(row(name, *gpu, change(ours, default), change(ours, off), ms))
    return found


@pytest.mark.parametrize("model", MODELS)
def test_vllm_is_quoted_with_its_setting(model):
    _, *rows = table(section(model))
    assert len(rows) == 5 and sorted(rows) == sorted(vllm_rows(model))
    text = words(section(model).partition("\n|")[0])  # what stands above the table
    assert all(part in text for part in LABORATORY)
    assert {r["command"] for r in vllm(model)} == set(re.findall(r"normquant bench vllm .*\d(?=\n)", section(model)))
    assert {(r["vllm"], r["torch"][:4]) for r in vllm(model)} == {("0.26.0", "2.11")}
    assert "vLLM 0.26.0, torch 2.11." in section("vLLM in a laboratory setting")


def installed_rows(title: str) -> list[str]:
    """The rows of a table of vLLM as it is installed: GPU time, its change, the captured step, wall time."""
    times: dict[str, dict[str, tuple[float, float, float | None]]] = {}
    for r in installed(title):
        times.setdefault(f"batch {r['batch']}", {})[r["setting"]] = (r["gpu_us_per_step"], r["tpot_ms"], r["replay_us"])
        for tokens, us in r["prefill_gpu_us"].items():
            times.setdefault(f"prompt of {tokens}", {})[r["setting"]] = (us, r["prefill_ms"][tokens], None)
    found = []
    for name, by_setting in times.items():
        without, ours = by_setting["installed"], by_setting["installed-normquant"]
        replayed = "not captured" if ours[2] is None else f"{without[2]:.1f} / {ours[2]:.1f}"
        gpu = f"{without[0]:.1f}", f"{ours[0]:.1f}", change(ours[0], without[0])
        found.append(row(name, *gpu, replayed, f"{without[1]:.2f} / {ours[1]:.2f}"))
    return found


def installed(title: str, rules: tuple[str, ...] = ("", "auto")) -> list[dict]:
    records, moe, compiled = INSTALLED[title]
    return [
        r
        for r in records
        if r["moe"] is moe
        and r.get("compiled", True) is compiled
        and r.get("tensor_parallel", 1) == 1
        and r.get("products", "") in rules
    ]


@pytest.mark.parametrize("title", INSTALLED)
def test_vllm_as_installed_is_quoted(title):
    records = installed(title)
    _, *rows = table(section(title))
    assert len(rows) == 3 + len(records[0]["prefill_ms"]) and sorted(rows) == sorted(installed_rows(title))
    (command,) = re.findall(r"^normquant bench vllm .*", section(title), re.M)
    assert ("--as-installed" in command) != ("--uncompiled" in command)
    assert all(r["command"].startswith(command) for r in records)
    ((vllm, flashinfer, torch),) = {(r["vllm"], r["flashinfer"], r["torch"][:4]) for r in records}
    text = words(section(title))
    assert f"vLLM {vllm}, FlashInfer {flashinfer.partition('.post')[0]}, torch {torch}" in text
    assert all(r["switches"] == {} for r in records)
    above = words(section("vLLM as pip installs it"))
    assert "one GPU runs, and no all-reduce" in above
    (gpu,) = {r["gpu"] for r in records}
    assert f"one {gpu}" in (text if "H100" in gpu else above)
    assert all(f"easured {r['date']}" in (text if "H100" in gpu else above) for r in records)
    assert {r["scales_not_power_of_two"] for r in records} == {0}


def test_wall_times_of_vllm_as_installed_are_quoted():
    text = words(section("vLLM as pip installs it"))
    for version, quoted in (("0.26", "{} of {} steps below took longer on 0.26"), ("0.33", "{} of {} on 0.33")):
        records = [r for title in INSTALLED for r in installed(title) if r["vllm"].startswith(version)]
        case = {(r["gpu"], r["moe"], r.get("compiled", True), r["batch"], r["setting"]): r["tpot_ms"] for r in records}
        slower = [case[*key[:-1], "installed-normquant"] > ms for key, ms in case.items() if key[-1] == "installed"]
        assert quoted.format(sum(slower), len(slower)) in text
    for title in ("Not compiled, vLLM 0.26", "Not compiled, vLLM 0.33"):
        prompts = {r["setting"]: r["prefill_ms"] for r in installed(title)}
        assert all(f"{ms:.2f}" in text for of in prompts.values() for ms in of.values())


def test_products_of_few_rows_in_vllm_are_quoted():
    auto, never = (
        {r["batch"]: r for r in installed("As installed, dense layers", (rule,))} for rule in ("auto", "never")
    )
    _, *rows = table(section("The same with vLLM's products"))
    expected = []
    for batch, theirs in never.items():
        one, other = theirs["gpu_us_per_step"], auto[batch]["gpu_us_per_step"]
        replayed = f"{theirs['replay_us']:.1f} / {auto[batch]['replay_us']:.1f}"
        expected.append(row(f"batch {batch}", f"{one:.1f}", f"{other:.1f}", change(other, one), replayed))
    assert rows == expected


def test_the_accuracy_of_vllm_as_installed_is_quoted():
    for title in INSTALLED:
        error = {r["setting"]: f"{r['logit_error']:.4f}" for r in installed(title)}
        assert f"Logit error {error['installed']} and {error['installed-normquant']}" in words(section(title))


def test_the_accuracy_of_vllm_is_quoted():
    errors = {model: {r["setting"]: f"{r['logit_error']:.4f}" for r in vllm(model)} for model in MODELS}
    _, *rows = table(section("Accuracy"))
    assert rows == [row(model, *(errors[model][setting] for setting in SETTINGS)) for model in MODELS]
    text = words(section("Accuracy"))
    assert f"(`--settings unfused`, error {errors['DeepGEMM']['unfused']})" in text
    scales = {r["setting"]: (r["scales_not_power_of_two"], r["scales"]) for r in vllm("DeepGEMM")}
    assert "{:,} of {:,} scales were no powers of two by default".format(*scales["default"]) in text
    assert f"{scales['off'][0]:,} with norm fusion off" in text and scales["normquant"][0] == 0


def test_every_table_of_the_page_is_compared_with_records():
    titles = ("Kernels", "Layers", *INSTALLED, "The same with vLLM's products", *MODELS, "Accuracy")
    titles += ("Products alone", "Products and their readers", "Products of other models", "A decode layer")
    assert sorted(table(PERFORMANCE)) == sorted(line for title in titles for line in table(section(title)))


def test_the_page_says_where_the_records_come_from():
    assert {r["gpu"] for r in RECORDS} == {"NVIDIA H100 80GB HBM3"} and "NVIDIA H100 80GB HBM3" in PERFORMANCE
    assert {(r["torch"], r["triton"]) for r in RECORDS} == {("2.11.0+cu130", "3.6.0")}
    assert "torch 2.11.0 and Triton 3.6.0" in PERFORMANCE
    commands = re.findall(r"^normquant bench .*", PERFORMANCE, re.M)
    assert len(commands) == 14
    ran = {r["command"] for path in FILES for r in read(path)}
    assert all(any(command.startswith(quoted) for command in ran) for quoted in commands)


def test_the_readme_quotes_the_layer_and_vllm():
    header, kernel, layer, *vllm_rows, several = table(README)[:6]
    assert "one H100" in header and COMPILED in kernel and COMPILED in layer
    us = {(m, setting): r["us"] for (model, m, setting), r in layers().items() if model == "deepseek-r1"}
    gains = (change(us[m, "normquant"], us[m, "stock"]) for m in (1, 64, 1024))
    assert f"of 1, 64, 1024 tokens | {COMPILED} | {', '.join(gains)} time |" in layer
    for text, title in zip(vllm_rows, ("As installed, dense layers", "vLLM 0.33, dense layers"), strict=True):
        records = installed(title)
        us = {(r["setting"], r["batch"]): r["gpu_us_per_step"] for r in records}
        us |= {(r["setting"], int(n)): value for r in records for n, value in r["prefill_gpu_us"].items()}
        steps, prompts = (
            ", ".join(change(us["installed-normquant", n], us["installed", n]) for n in sizes)
            for sizes in ((1, 16, 64), (2048, 8192))
        )
        assert text.startswith(f"| vLLM {records[0]['vllm'][:4]} as pip installs it, on one H200")
        assert text.endswith(f"without `NORMQUANT=1` | {steps}; {prompts} GPU time |")
    of = {(r["setting"], r["batch"]): r["replay_us"] for r in H200_26 if r["tensor_parallel"] == 4 and not r["moe"]}
    steps = ", ".join(change(of["installed-normquant", n], of["installed", n]) for n in (1, 16, 64))
    assert "on four H200" in several and several.endswith(f"NORMQUANT_ALL_REDUCE=1` | {steps} GPU time |")
