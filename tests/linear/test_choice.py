"""Which kernels a product of few rows gets: what was measured, and nothing else."""

import json
from pathlib import Path

import pytest
import torch

from normquant.bench.products import SHAPES
from normquant.bench.record_files import read
from normquant.linear import choice
from normquant.linear.choice import AUTO_ROWS, PRODUCT, choose, parse, pays

RECORDS = Path(__file__).parents[2] / "baselines" / "h100.jsonl"
GPU, CPU = torch.device("cuda"), torch.device("cpu")
TABLE = {
    "capability": "9.0",
    "source": "normquant tune --linear",
    "entries": [
        {"part": PRODUCT, "k": 7168, "n": 2112, "m": [1, 16], "us": {"normquant": 7.9, "deepgemm": 14.2}},
        {"part": PRODUCT, "k": 7168, "n": 2112, "m": [17, 64], "us": {"normquant": 9.9, "deepgemm": 9.7}},
        {"part": "rope_last", "k": 1536, "n": 3072, "m": [1, 8], "us": {"normquant": 5.1, "deepgemm": 6.2}},
        {"part": "rope_last", "k": 1536, "n": 3072, "m": [9, 64], "us": {"normquant": 5.3, "deepgemm": 6.2}},
        {"part": "silu_mul_quant", "k": 7168, "n": 4608, "m": [1, 32], "us": {"normquant": 14.1, "scaled_mm": 17.0}},
    ],
}


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    choice._choose.cache_clear()
    yield monkeypatch
    choice._choose.cache_clear()


@pytest.fixture
def measured(on_hopper):
    table = parse(json.dumps(TABLE), "table")
    on_hopper.setattr(choice, "measured", lambda capability: table if capability == (9, 0) else None)


def test_nothing_is_chosen_that_was_not_measured(on_hopper):
    for part in (PRODUCT, "add_rms_norm_quant"):
        for device, where in ((GPU, "sm_90"), (CPU, "a CPU")):
            found = choose(part, 7168, 2240, 1, device)
            assert not found.split and "no measurements" in found.reason and where in found.reason
            assert not pays(part, 7168, 2240, device).split


def test_the_tuner_is_no_remedy_for_an_op_of_a_group(on_hopper):
    for part, remedy in (("add_rms_norm_quant", True), ("all_reduce_add_rms_norm_quant", False)):
        reason = choose(part, 7168, 2240, 1, GPU).reason
        assert "no measurements" in reason and ("normquant tune" in reason) == remedy


@pytest.mark.parametrize(("k", "n", "reader"), [shape for model in SHAPES.values() for shape in model if shape[2]])
def test_every_pair_that_is_committed_for_hopper_is_chosen_for_few_rows(on_hopper, k, n, reader):
    assert [choose(reader, k, n, m, GPU).split for m in (1, 16, 31, 32, 64, 65)] == [True] * 3 + [False] * 3
    assert not choose(reader, k, n, 1, CPU).split


@pytest.fixture(scope="module")
def recorded():
    """Part, K, N and rows, of few rows -> microseconds by provider."""
    found = {}
    for r in read(RECORDS):
        if r["suite"] == "linear" and r["m"] < AUTO_ROWS and r["part"] in ("product", "pair"):
            part = r["reader"] if r["part"] == "pair" else PRODUCT
            found.setdefault((part, r["k"], r["n"], r["m"]), {})[r["provider"]] = r["us"]
    return found


def test_what_was_slower_is_not_chosen(on_hopper, recorded):
    faster = {
        case: us["normquant"] < min(other for name, other in us.items() if name != "normquant")
        for case, us in recorded.items()
    }
    assert {case: choose(*case, GPU).split for case in recorded} == faster
    assert any(faster.values()) and not all(faster.values())


def test_beside_one_product_no_other_counts(on_hopper, recorded):
    """torch alone has no DeepGEMM and no FlashInfer to call, so that they keep nothing from being split."""
    assert all(us["normquant"] < us["scaled_mm"] for us in recorded.values())
    assert all(choose(*case, GPU, rivals=("scaled_mm",)).split for case in recorded)
    reason = choose(PRODUCT, 2048, 5120, 31, GPU, rivals=("scaled_mm",)).reason
    assert "scaled_mm 12.22 us" in reason and "deepgemm" not in reason
    assert not choose(PRODUCT, 2048, 5120, 64, GPU, rivals=("scaled_mm",)).split


def test_a_rival_that_was_not_measured_leaves_all_others(measured):
    assert not choose(PRODUCT, 7168, 2112, 17, GPU, rivals=("scaled_mm",)).split
    assert pays("silu_mul_quant", 7168, 4608, GPU, 31, ("scaled_mm",)).split


@pytest.mark.parametrize(("m", "split"), [(1, True), (16, True), (17, False), (31, False), (64, False), (65, False)])
def test_the_fastest_for_each_number_of_rows(measured, m, split):
    found = choose(PRODUCT, 7168, 2112, m, GPU)
    assert found.split == split
    assert ("normquant 7.9 us" in found.reason) == (m <= 16)
    assert ("deepgemm 9.7 us" in found.reason) == (17 <= m < 32)
    assert (f"{m} rows; products of 32 rows and more" in found.reason) == (m >= 32)


def test_from_32_rows_on_nothing_is_split_however_fast_it_is_alone(measured):
    assert [choose("rope_last", 1536, 3072, m, GPU).split for m in (8, 31, 32, 64)] == [True, True, False, False]
    assert pays("rope_last", 1536, 3072, GPU).split


def test_a_pair_has_measurements_of_its_own(measured):
    assert choose("silu_mul_quant", 7168, 4608, 8, GPU).split
    assert not choose(PRODUCT, 7168, 4608, 8, GPU).split
    assert not choose("silu_mul_quant", 7168, 2112, 8, GPU).split
    assert pays(PRODUCT, 7168, 2112, GPU).split and "7.9 us" in pays(PRODUCT, 7168, 2112, GPU).reason
    assert not pays("silu_mul_quant", 7168, 2112, GPU).split


def test_where_the_number_of_rows_is_known_it_decides(measured):
    found = {m: pays(PRODUCT, 7168, 2112, GPU, m).split for m in (1, 16, 17, 4096, None)}
    assert found == {1: True, 16: True, 17: False, 4096: False, None: True}


def test_always_is_for_few_rows():
    assert choose(PRODUCT, 512, 512, 64, CPU, "always").split
    found = choose(PRODUCT, 512, 512, 65, CPU, "always")
    assert not found.split and "65 rows" in found.reason


def test_an_unknown_wish_is_refused():
    with pytest.raises(ValueError, match="'never'; accepted: 'auto', 'always'"):
        choose(PRODUCT, 512, 512, 1, CPU, "never")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"capability": "9"}, "not enough values"),
        ({"entries": [{"part": "product"}]}, "'us'"),
        ({"entries": [TABLE["entries"][0] | {"us": {"deepgemm": 1.0}}]}, "'normquant' and at least one other"),
        ({"entries": [TABLE["entries"][0] | {"us": {"normquant": 1.0}}]}, "at least one other"),
    ],
)
def test_what_is_no_table(change, said):
    with pytest.raises(ValueError, match=said):
        parse(json.dumps(TABLE | change), "table")


def test_committed_tables_can_be_read():
    for capability in ((9, 0), (10, 0)):
        choice.measured(capability)
