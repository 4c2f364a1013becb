"""Tables of measured strategies, as files and as answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from normquant.compile.measured import Entry, StrategyTable, measured, parse


def record(*entries: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"capability": "9.0", "source": "a command", "entries": list(entries), **fields}


def entry(m: list[int], **us: float) -> dict[str, Any]:
    return {"op": "rms_norm_quant", "k": 7168, "m": m, "us": us}


def table(*entries: dict[str, Any], **fields: Any) -> StrategyTable:
    return parse(json.dumps(record(*entries, **fields)), "t.json")


def test_a_file_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps(record(entry([1, 16], stock=4, fused=1.5), torch="2.11.0"), ensure_ascii=False))
    entries = (Entry("rms_norm_quant", 7168, 1, 16, (("fused", 1.5), ("stock", 4.0))),)
    assert StrategyTable.load(str(path)) == StrategyTable((9, 0), "a command", entries, "2.11.0")


def test_a_file_that_does_not_say_its_torch() -> None:
    found = table(entry([1, 16], stock=4, fused=1.5))
    assert found.torch == ""
    assert found.fastest("rms_norm_quant", 7168, 16) == ("fused", "measured: M 1..16: fused 1.5 us, stock 4 us")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "JSONDecodeError: Expecting value: line 1 column 1 (char 0)"),
        ("[]", "TypeError: list indices must be integers or slices, not str"),
        ("{}", "KeyError: 'capability'"),
        (
            {"capability": "9", "source": "", "entries": []},
            "ValueError: not enough values to unpack (expected 2, got 1)",
        ),
        (record(entry([1, 2], fused=1)), "ValueError: us holds ['fused']; 'stock' and at least one of"),
        (record(entry([1, 2], stock=1)), "ValueError: us holds ['stock']; 'stock' and at least one of"),
        (record(entry([1, 2], fused=1, native=2)), "ValueError: us holds ['fused', 'native']; 'stock' and at least"),
        (record(entry([1, 2], quick=1, stock=2)), "ValueError: us holds ['quick', 'stock']; 'stock' and at least one"),
        (record(entry([1, 2], quick=1, stock=2, fused=3)), "ValueError: us holds ['fused', 'quick', 'stock']; 'stock'"),
        (record(entry([1], fused=1, stock=2)), "ValueError: not enough values to unpack (expected 2, got 1)"),
    ],
)
def test_what_is_no_table_is_refused_by_name_and_reason(content: Any, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError) as caught:
        StrategyTable.load(str(path))
    assert str(caught.value).startswith(f"{path} is not a table of measurements: {reason}")
    assert caught.value.__suppress_context__


def test_the_fastest_has_its_times_for_a_reason() -> None:
    found = table(entry([1, 16], fused=1.5, native=2, stock=4), entry([17, 64], fused=3, stock=2.25), torch="2.13.0")
    assert found.fastest("rms_norm_quant", 7168, 1) == (
        "fused",
        "measured with torch 2.13.0: M 1..16: fused 1.5 us, native 2 us, stock 4 us",
    )
    assert found.fastest("rms_norm_quant", 7168, 64) == (
        "stock",
        "measured with torch 2.13.0: M 17..64: fused 3 us, stock 2.25 us",
    )
    assert found.fastest("rms_norm_quant", 7168, None) == (
        "stock",
        "measured with torch 2.13.0: no strategy is the fastest for every number of rows "
        "(M 1..16: fused 1.5 us, native 2 us, stock 4 us; M 17..64: fused 3 us, stock 2.25 us)",
    )


def test_of_any_number_of_rows_what_is_always_the_fastest_is_taken() -> None:
    found = table(entry([1, 16], fused=1, stock=4), entry([17, 64], fused=2, stock=3))
    expected = "fused", "measured: M 1..16: fused 1 us, stock 4 us; M 17..64: fused 2 us, stock 3 us"
    assert found.fastest("rms_norm_quant", 7168, None) == expected


@pytest.mark.parametrize(("op", "k", "m"), [("group_quant", 7168, 1), ("rms_norm_quant", 512, 1)])
def test_what_was_not_measured_has_no_answer(op: str, k: int, m: int) -> None:
    assert table(entry([1, 16], fused=1, stock=4)).fastest(op, k, m) is None


@pytest.mark.parametrize("m", [3, 17])
def test_rows_outside_of_what_was_measured_have_no_answer(m: int) -> None:
    assert table(entry([4, 16], fused=1, stock=4)).fastest("rms_norm_quant", 7168, m) is None


def test_the_tables_of_the_package_can_be_read() -> None:
    found = measured((9, 0))
    assert found is not None and found.capability == (9, 0) and found.entries
    assert measured((3, 5)) is None
