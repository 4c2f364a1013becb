"""`normquant bench linear` without a GPU: its cases, what is timed, how far from float64, and the records."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from normquant.bench import products
from normquant.bench.comparison import compare
from normquant.bench.products import (
    FEW_MS,
    OURS,
    SHAPES,
    ProductCase,
    ProductProvider,
    error_of,
    product_cases,
    product_inputs,
    product_line,
    product_records,
)
from normquant.bench.record_files import problems
from normquant.bench.records import Provenance
from normquant.bench.timing import Timing
from normquant.linear import dequantized_linear
from normquant.linear.split_product import split_product
from normquant.ops import OPS

PROVENANCE = Provenance(
    gpu="an H100", torch="2.11.0", triton="3.6.0", version="0.1.0", command="normquant bench linear"
)
CASE = ProductCase(256, 256, 3, "silu_mul_quant")


def in_torch(multiply: Callable[..., torch.Tensor]) -> ProductProvider:
    return ProductProvider(lambda i: lambda *tensors: multiply(*tensors, torch.bfloat16))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A GPU on which the n-th thing that is timed takes n microseconds; gives the names of what was timed."""
    names: list[str] = []

    def time_calls(work: dict[str, Any], samples: int) -> dict[str, Timing]:
        names.extend(work)
        return {name: Timing(n, n - 0.5, n + 0.5, samples) for n, name in enumerate(work, 1)}

    providers = {OURS: in_torch(split_product), "scaled_mm": in_torch(dequantized_linear)}
    monkeypatch.setattr(products, "PRODUCT_PROVIDERS", providers)
    monkeypatch.setattr(products, "product_inputs", lambda case, sets: product_inputs(case, sets, "cpu"))
    monkeypatch.setattr(products, "sets_needed", lambda count: 2)
    monkeypatch.setattr(products, "time_calls", time_calls)
    monkeypatch.setattr(products, "current_run", lambda version: PROVENANCE)
    return names


def test_every_product_of_the_models_once() -> None:
    cases = product_cases()
    assert len(cases) == len(set(cases)) == len(FEW_MS) * len({shape for model in SHAPES.values() for shape in model})
    assert {(c.k, c.n, c.m) for c in product_cases((1536,), (1, 8))} == {(1536, 3072, 1), (1536, 3072, 8)}
    assert product_cases((1536,), (1,), ("Llama-3-70B",)) == []


@pytest.mark.parametrize("case", product_cases(ms=(2,)), ids=str)
def test_a_reader_takes_what_its_product_makes(case: ProductCase) -> None:
    fp8 = torch.empty(case.n, case.k, dtype=torch.float8_e4m3fn)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "quantize_weight", lambda weight: (fp8, torch.empty(-(-case.n // 128), case.k // 128)))
        i = product_inputs(case, 1, "cpu")
    assert i.data.shape == (case.m, case.k)
    if case.reader:
        OPS[case.reader].check(torch.empty(case.m, case.n, dtype=torch.bfloat16), *i.rest)


def test_weights_lie_in_memory_of_their_own() -> None:
    i = product_inputs(CASE, 3, "cpu")
    assert len({weight.data_ptr() for weight, _ in i.weights}) == 3
    assert all(torch.equal(weight.view(torch.uint8), i.weights[0][0].view(torch.uint8)) for weight, _ in i.weights)


def test_every_provider_alone_and_with_the_reader(measured: list[str]) -> None:
    records = product_records(CASE, (OURS, "scaled_mm"), 9)
    parts = [(r.provider, r.part) for r in records]
    assert parts == [
        *((OURS, "product"), ("scaled_mm", "product"), (OURS, "parts"), (OURS, "reader")),
        *((OURS, "pair"), ("scaled_mm", "pair")),
    ]
    assert measured == [" ".join(part) for part in parts]
    for record in records:
        written = record.__dict__
        assert problems(dict(written)) == [] and written["suite"] == "linear" and written["samples"] == 9
        assert (written["k"], written["n"], written["m"], written["reader"]) == (256, 256, 3, "silu_mul_quant")
        assert (record.error is None) == (record.part in ("parts", "reader"))
    assert "256x256 m=3 -> silu_mul_quant: normquant product 1.00" in product_line(records)


def test_a_product_that_nobody_reads(measured: list[str]) -> None:
    records = product_records(ProductCase(256, 256, 3, ""), (OURS,), 9)
    assert [(r.provider, r.part) for r in records] == [(OURS, "product"), (OURS, "parts")]


def test_the_error_is_that_of_the_product() -> None:
    i = product_inputs(CASE, 1, "cpu")
    right = error_of(lambda *tensors: dequantized_linear(*tensors, torch.float32), i)
    rounded = error_of(lambda *tensors: dequantized_linear(*tensors, torch.bfloat16), i)
    assert 0 < right < 1e-6 < rounded < 4e-3
    assert error_of(lambda *tensors: 1.1 * dequantized_linear(*tensors, torch.float32), i) == pytest.approx(0.1, 1e-3)


def test_records_of_two_products_are_two_cases(measured: list[str]) -> None:
    wide = ProductCase(256, 512, 3, "silu_mul_quant")
    records = [dict(r.__dict__) for case in (CASE, wide) for r in product_records(case, (OURS, "scaled_mm"), 9)]
    changes, *missing = compare(records, records)
    assert len(changes) == len(records) == 12 and missing == [0, 0]
