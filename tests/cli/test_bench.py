"""`normquant bench kernels --ranks` and `bench linear` as commands: what they ask for."""

from __future__ import annotations

import argparse

import pytest

from normquant.bench import products, ranks
from normquant.cli import bench as command


def of_ranks(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(["kernels", "--ranks", "4", *words])


def test_cases_of_several_ranks_are_rows_of_a_hidden_state(monkeypatch):
    asked = []
    monkeypatch.setattr(ranks, "on_ranks", lambda *args: asked.append(args) or [])
    assert list(command.kernel_suite(of_ranks("--m", "1,64", "--samples", "3"))) == []
    ((world, cases, names, samples),) = asked
    assert (world, names, samples) == (4, None, 3)
    assert [(c.op, c.m, c.k) for c in cases] == [("add_rms_norm_quant", m, 7168) for m in (1, 64)]


def test_an_unknown_provider_of_several_ranks_is_named():
    with pytest.raises(ValueError, match="unknown providers mpi; accepted: normquant, normquant sharded"):
        list(command.kernel_suite(of_ranks("--providers", "mpi")))


def test_products_that_are_asked_for(monkeypatch, capsys):
    def record(case, names, samples):
        asked.append((case.k, case.n, case.m, tuple(names), samples))
        return []

    asked: list[tuple] = []
    monkeypatch.setattr(products, "product_records", record)
    monkeypatch.setattr(products, "product_line", lambda records: "a line")
    monkeypatch.setitem(products.PRODUCT_PROVIDERS, "absent", products.ProductProvider(print, lambda: "not installed"))
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    words = ["linear", "--models", "DeepSeek-R1", "--k", "1536,2304", "--m", "1,64", "--samples", "3"]
    args = parser.parse_args([*words, "--providers", "normquant,scaled_mm,absent"])
    assert [text for _, text in command.linear_suite(args)] == ["a line"] * 4
    names = ("normquant", "scaled_mm")
    assert asked == [(k, n, m, names, 3) for k, n in ((1536, 3072), (2304, 7168)) for m in (1, 64)]
    assert "absent: left out, not installed" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no product of DeepSeek-R1 has k in"):
        list(command.linear_suite(parser.parse_args([*words[:3], "--k", "128"])))
