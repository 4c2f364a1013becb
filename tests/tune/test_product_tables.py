"""`normquant tune --linear` without a GPU: what is measured, what is chosen, and what the kernels read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from normquant.bench.products import ProductCase, product_cases
from normquant.bench.record_files import read
from normquant.bench.timing import Timing
from normquant.kernels import product_configs
from normquant.kernels.product_configs import ProductConfig
from normquant.linear import choice
from normquant.linear.choice import parse
from normquant.tune import product_tables
from normquant.tune.product_tables import Way, choose, compare, entries_of, merged, splits, ways, write

RECORDS = Path(__file__).parents[2] / "baselines" / "h100.jsonl"
A, B = ProductConfig(), ProductConfig(8, 128, 3, "waited")


def us(times: dict[Way, float]) -> dict[Way, Timing]:
    return {way: Timing(t, t, t, 5) for way, t in times.items()}


def test_the_split_is_one_for_all_numbers_of_rows() -> None:
    measured = {
        1: us({(2, A): 10.0, (2, B): 11.0, (8, A): 6.0, (8, B): 9.0}),
        64: us({(2, A): 9.0, (2, B): 9.5, (8, A): 12.0, (8, B): 10.0}),
    }
    found = choose(7168, 2112, measured)
    assert found.split == 8  # 1.0 and 1.11 times the best, against 1.67 and 1.0
    assert found.us == {1: 6.0, 64: 10.0}
    assert found.tables[0] == {"7168x2112": 8}
    other = {"num_warps": 8, "columns": 128, "stages": 3, "release": "waited"}
    assert found.tables[1] == {"7168x2112": [{"up_to": 1}, {"up_to": 64} | other]}
    assert "7168x2112 in 8 parts: m=1 6.00 us" in found.text


def test_a_neighbour_within_the_noise_keeps_its_row() -> None:
    measured = {m: us({(4, A): 5.0 if m == 1 else 5.02, (4, B): 5.0 + (m == 1)}) for m in (1, 8)}
    assert choose(512, 512, measured).rows == ({"up_to": 8},)


@pytest.mark.parametrize("case", product_cases(ms=(1,)), ids=str)
def test_the_ways_of_a_product(case: ProductCase) -> None:
    found = ways(case.k, case.n)
    assert len(found) == len(set(found))
    for split in splits(case.k, case.n):
        assert 1 <= split <= min(16, case.k // 128)
        assert product_configs.without_empty_parts(case.k, split) == split
    assert {config.columns for _, config in found} == {64, 128}
    assert product_configs.split_of(case.k, case.n) in splits(case.k, case.n)


def test_a_split_that_is_in_the_table_stays() -> None:
    assert {split for split, _ in ways(7168, 2112)} == {product_configs.split_in_table(7168, 2112)} == {4}
    assert product_configs.split_in_table(7168, 2176) is None
    assert {split for split, _ in ways(7168, 2176)} == set(splits(7168, 2176)) and len(splits(7168, 2176)) > 1


@pytest.fixture
def no_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installation whose tables lie in a folder of their own."""
    (tmp_path / "product_tables").mkdir()
    monkeypatch.setattr(product_configs.resources, "files", lambda _: tmp_path)
    product_tables.read_again()
    yield tmp_path / "product_tables"
    product_tables.read_again()


def test_what_is_written_is_what_the_kernels_read(no_tables: Path) -> None:
    split, config = product_configs.split_of(7168, 2112), product_configs.product_config(7168, 2112, 1, (9, 0))
    assert (split, config) == (8, ProductConfig())
    found = choose(7168, 2112, {1: us({(4, B): 1.0}), 64: us({(4, A): 2.0, (4, B): 3.0})})
    for name, table in zip(("splits.json", "sm90.json"), found.tables, strict=True):
        (no_tables / name).write_text(json.dumps(table))
    product_tables.read_again()
    assert product_configs.split_of(7168, 2112) == 4 and product_configs.split_of(7168, 4608) == 3
    chosen = [product_configs.product_config(7168, 2112, m, (9, 0)) for m in (1, 2, 64, 1000)]
    assert chosen == [B, A, A, A]
    assert product_configs.product_config(7168, 2112, 1, (10, 0)) == ProductConfig()  # of another GPU nothing is known


def fake_measure(case: ProductCase, names: Any, samples: int) -> Any:
    for part in ("product", "parts", "reader", "pair"):
        for at, name in enumerate(names if part in ("product", "pair") else names[:1]):
            t = case.m + at
            yield name, part, Timing(t, t, t, samples), None


def test_the_table_that_chooses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_tables, "measure_products", fake_measure)
    cases = [ProductCase(512, 768, m, "silu_mul_quant") for m in (16, 1)]
    entries = list(compare(cases, ("normquant", "scaled_mm"), 5))
    assert [(e["part"], e["m"]) for e in entries] == [
        *(("product", [1, 1]), ("silu_mul_quant", [1, 1]), ("product", [2, 16]), ("silu_mul_quant", [2, 16])),
    ]
    assert entries[0]["us"] == {"normquant": 1, "scaled_mm": 2}
    path = tmp_path / "sm90.json"
    old = {"entries": [entries[0] | {"k": 640}, entries[0] | {"us": {"normquant": 99, "scaled_mm": 1}}]}
    write(path, merged(old, entries, (9, 0), "normquant tune --linear"))
    table = parse(path.read_text(), path.name)
    assert table.capability == (9, 0) and len(table.of("product", 640, 768)) == 1
    assert [e.fastest for e in table.of("product", 512, 768)] == ["normquant", "normquant"]


def test_an_entry_speaks_for_the_rows_above_those_of_the_one_before() -> None:
    us = {("normquant", "product"): 1.004, ("deepgemm", "product"): 2.0, ("normquant", "parts"): 0.5}
    products = ((768, ""), (768, "group_quant"), (896, ""))
    cases = [ProductCase(512, n, m, reader) for n, reader in products for m in (1, 8)]
    entries = list(entries_of((case, us) for case in cases))
    assert [(e["n"], e["m"]) for e in entries] == [(768, [1, 1]), (768, [2, 8])] * 2 + [(896, [1, 1]), (896, [2, 8])]
    assert all(e["us"] == {"normquant": 1.0, "deepgemm": 2.0} for e in entries)


def test_the_committed_table_is_what_the_committed_records_say() -> None:
    records = [r for r in read(RECORDS) if r["suite"] == "linear"]
    cases: dict[ProductCase, dict[tuple[str, str], float]] = {}
    for r in records:
        cases.setdefault(ProductCase(r["k"], r["n"], r["m"], r["reader"]), {})[r["provider"], r["part"]] = r["us"]
    ascending = sorted(cases.items(), key=lambda item: (item[0].k, item[0].n, item[0].reader, item[0].m))
    source = "; ".join(dict.fromkeys(r["command"] for r in records))
    _, _, path = product_tables.paths((9, 0))
    assert json.loads(path.read_text()) == merged({}, list(entries_of(ascending)), (9, 0), source)


def test_without_a_peer_nothing_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_tables, "measure_products", fake_measure)
    assert list(compare([ProductCase(512, 768, 1, "")], ("normquant",), 5)) == []


def test_tables_lie_where_they_are_read() -> None:
    splits, configs, chosen = product_tables.paths((9, 0))
    assert splits.parent == configs.parent == Path(product_configs.__file__).parent / "product_tables"
    assert chosen.parent == Path(choice.__file__).parent / "tables" and chosen.name == configs.name == "sm90.json"


def test_committed_splits_leave_no_part_empty() -> None:
    for name, split in product_configs._splits().items():
        k, n = map(int, name.split("x"))
        assert product_configs.without_empty_parts(k, split) == split == product_configs.split_of(k, n)


@pytest.mark.parametrize("bad", [{"num_warps": 2}, {"columns": 32}, {"stages": 0}, {"release": "never"}])
def test_a_config_that_would_change_bits_or_nothing_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        ProductConfig(**bad)


@pytest.mark.parametrize("programs", [1, 96, 112, 132, 133, 216, 264, 300, 396])
def test_no_more_programs_fit_on_a_multiprocessor_than_it_has_to_take(programs: int) -> None:
    whole, most = 228 * 1024, -(-programs // 132)
    taken = product_configs.shared_memory(programs, 132, whole) + product_configs.OWN_SHARED
    assert taken % 128 == 0 and whole // taken == most


def test_many_programs_and_no_gpu_take_what_they_need() -> None:
    assert product_configs.shared_memory(397, 132, 228 * 1024) == 0 == product_configs.shared_memory(96, 0, 0)


def test_a_split_depends_on_k_and_n_alone() -> None:
    assert [product_configs._split_rule(k, n) for k, n in ((7168, 2112), (1536, 3072), (128, 64), (256, 10**6))] == [
        *(8, 4, 1, 1),
    ]
    for m in (1, 16, 17, 64, 65, 1000):
        assert product_configs.rows_of_program(m) in (16, 32, 64)
