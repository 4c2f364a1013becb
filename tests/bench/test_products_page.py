"""docs/performance.md quotes the committed measurements of products of few rows as they are."""

from __future__ import annotations

from functools import partial
from itertools import groupby
from pathlib import Path

import pytest
from shared import pages
from shared.pages import row, table, words

from normquant.bench.products import FEW_MS, NONE, NORM, OURS, PRODUCT_PROVIDERS, SHAPES, ProductCase
from normquant.bench.record_files import read
from normquant.linear.choice import AUTO_ROWS, SCALED_MM

ROOT = Path(__file__).parents[2]
RECORDS = [r for r in read(ROOT / "baselines" / "h100.jsonl") if r["suite"] in ("linear", "decode")]
LINEAR = [r for r in RECORDS if r["suite"] == "linear"]
section = partial(pages.section, (ROOT / "docs" / "performance.md").read_text(encoding="utf-8"))
DEEPSEEK = "DeepSeek-R1"
OTHER_MODELS = tuple(model for model in SHAPES if model != DEEPSEEK)
OTHERS = ("flashinfer", "deepgemm", "scaled_mm")
Us = dict[ProductCase, float]


def times(part: str, *models: str, provider: str = OURS) -> Us:
    """Microseconds of a part of the models' products, in their order."""
    us = {
        ProductCase(r["k"], r["n"], r["m"], r["reader"]): r["us"]
        for r in LINEAR
        if (r["provider"], r["part"]) == (provider, part)
    }
    wanted = (ProductCase(k, n, m, reader) for model in models for k, n, reader in SHAPES[model] for m in FEW_MS)
    return {case: us[case] for case in wanted if case.reader or part in ("product", "parts")}


def best_other(part: str, *models: str) -> Us:
    """The time of the fastest product that is not ours."""
    found = [times(part, *models, provider=provider) for provider in OTHERS]
    return {case: min(us[case] for us in found) for case in found[0]}


def few(us: Us) -> list[ProductCase]:
    """The cases of a number of rows that may be split."""
    return [case for case in us if case.m < AUTO_ROWS]


def rows_of(names: list[str], ours: Us, others: Us) -> list[str]:
    """The rows of a table: each product's times and those of the best other."""
    lines = [list(cases) for _, cases in groupby(ours, key=lambda c: (c.k, c.n))]
    return [
        row(name, *(f"{ours[case]:.2f} / {others[case]:.2f}" for case in cases))
        for name, cases in zip(names, lines, strict=True)
    ]


def test_every_product_of_the_models_was_measured() -> None:
    assert {(r["k"], r["n"], r["reader"]) for r in LINEAR} == {shape for model in SHAPES.values() for shape in model}
    assert set(PRODUCT_PROVIDERS) == {OURS, *OTHERS}
    for k, n, reader in {shape for model in SHAPES.values() for shape in model}:
        parts = [(OURS, "parts"), *((provider, "product") for provider in PRODUCT_PROVIDERS)]
        parts += [(OURS, "reader"), *((provider, "pair") for provider in PRODUCT_PROVIDERS)] if reader else []
        wanted = sorted((m, *part) for m in FEW_MS for part in parts)
        assert sorted((r["m"], r["provider"], r["part"]) for r in LINEAR if (r["k"], r["n"]) == (k, n)) == wanted


def test_the_products_are_quoted() -> None:
    rows = [("normquant, partial sums", OURS, "parts"), ("normquant, summed", OURS, "product")]
    rows += [(provider, provider, "product") for provider in OTHERS]
    expected = []
    for label, provider, part in rows:
        us = times(part, DEEPSEEK, provider=provider)
        expected.append(row(label, *(f"{sum(v for case, v in us.items() if case.m == m):.1f}" for m in FEW_MS)))
    assert table(section("Products alone")) == [row("us", *FEW_MS), *expected]


def test_products_and_their_readers_are_quoted() -> None:
    ours, best = times("pair", DEEPSEEK), best_other("pair", DEEPSEEK)
    total = {m: [sum(us for case, us in found.items() if case.m == m) for found in (ours, best)] for m in FEW_MS}
    names = [f"{k} x {n}, {reader}" for k, n, reader in SHAPES[DEEPSEEK]]
    sums = row("all", *(f"{total[m][0]:.1f} / {total[m][1]:.1f}" for m in FEW_MS))
    header = row("us, normquant / best other", *FEW_MS)
    assert table(section("Products and their readers")) == [header, *rows_of(names, ours, best), sums]


def test_products_of_other_models_are_quoted() -> None:
    shapes = [(model, *shape) for model in OTHER_MODELS for shape in SHAPES[model]]
    with_reader = [f"{model}, {k} x {n}, {reader}" for model, k, n, reader in shapes if reader]
    alone = [f"{model}, {k} x {n}" for model, k, n, reader in shapes if reader == NONE]
    ours, best = times("product", *OTHER_MODELS), best_other("product", *OTHER_MODELS)
    unread = {case: us for case, us in ours.items() if case.reader == NONE}
    assert table(section("Products of other models")) == [
        row("us, normquant / best other", *FEW_MS),
        *rows_of(with_reader, times("pair", *OTHER_MODELS), best_other("pair", *OTHER_MODELS)),
        row("us, normquant summed / best other", *FEW_MS),
        *rows_of(alone, unread, best),
    ]


@pytest.mark.parametrize(
    ("title", "models"), [("Products and their readers", (DEEPSEEK,)), ("Products of other models", OTHER_MODELS)]
)
def test_what_a_reader_of_partial_sums_costs_is_quoted(title: str, models: tuple[str, ...]) -> None:
    ours, parts, reader, summed = (times(part, *models) for part in ("pair", "parts", "reader", "product"))
    more = max(ours[case] - parts[case] - reader[case] for case in few(ours))
    adding = [summed[case] - parts[case] for case in few(ours)]
    assert f"at most {more:.2f} us more" in words(section(title))
    assert f"{min(adding):.1f} to {max(adding):.1f}, is saved" in words(section(title))


def test_what_a_norm_costs_beside_a_sum_is_quoted() -> None:
    def most(models: tuple[str, ...], rows: int) -> str:
        pair, summed = times("pair", *models), times("product", *models)
        cases = [case for case in pair if case.reader == NORM and case.m <= rows]
        worst = max(cases, key=lambda case: pair[case] / summed[case])
        return f"{100 * (pair[worst] / summed[worst] - 1):.1f} %" + f" ({worst.k} x {worst.n})" * (rows == 31)

    assert f"at most {most((DEEPSEEK,), 64)} longer" in words(section("Products and their readers"))
    page = words(section("Products of other models"))
    assert f"at most {most(OTHER_MODELS, 16)} longer" in page and f"at 31 rows {most(OTHER_MODELS, 31)}" in page


def test_the_errors_are_the_same_to_four_digits() -> None:
    found: dict[tuple[int, int, int], set[str]] = {}
    for r in LINEAR:
        if r["error"] is not None:
            found.setdefault((r["k"], r["n"], r["m"]), set()).add(f"{r['error']:.3e}")
    assert [case for case, errors in found.items() if len(errors) > 1] == []
    assert "to four digits" in words(section("Products and their readers"))
    assert "to four digits" in words(section("Products of other models"))


def test_what_is_chosen_of_other_models_is_said() -> None:
    page = words(section("Products of other models"))
    pairs, best = times("pair", *OTHER_MODELS), best_other("pair", *OTHER_MODELS)
    gains = [1 - pairs[case] / best[case] for case in few(pairs)]
    assert f"all seven pairs are chosen up to 31 rows, where they take {percents(gains)} less time" in page
    faster = [(case.k, case.n, case.m) for case in pairs if case.m >= AUTO_ROWS and pairs[case] < best[case]]
    assert faster == [(4096, 2048, 64)] and "At 64 rows one is faster, 4096 x 2048, and not chosen" in page


def test_what_is_the_fastest_alone_is_said() -> None:
    page = words(section("Products of other models"))
    alone, best = times("product", *OTHER_MODELS), best_other("product", *OTHER_MODELS)
    wins = {case: alone[case] < best[case] for case in few(alone) if not case.reader}
    assert {(case.k, case.n) for case, faster in wins.items() if faster} == {(5120, 1280), (8192, 1280)}
    assert {(case.k, case.n) for case, faster in wins.items() if not faster} == {(2048, 5120)}
    assert "5120 x 1280 and 8192 x 1280 are the fastest up to 31 rows, and 2048 x 5120 never" in page
    never = [1 - best[case] / alone[case] for case in few(alone) if (case.k, case.n) == (2048, 5120)]
    assert f"FlashInfer's takes {percents(never)} less" in page
    slower = max(alone[case] / best[case] - 1 for case in few(alone) if case.reader)
    assert f"up to {100 * slower:.1f} % slower" in page


@pytest.mark.parametrize("part", ["product", "pair"])
def test_what_torch_alone_gets_is_said(part: str) -> None:
    ours, other = times(part, *SHAPES), times(part, *SHAPES, provider=SCALED_MM)
    page = words(section("Products of other models"))
    gains = percents([1 - ours[case] / other[case] for case in few(ours)])
    assert (f"{gains} alone" if part == "product" else f"and {gains} with their readers") in page
    at_64 = [case for case in ours if case.m == 64]
    faster = sum(ours[case] < other[case] for case in at_64)
    assert f"{faster} of the {len(at_64)} {'are alone' if part == 'product' else 'that have a reader with it'}" in page


def percents(of: list[float]) -> str:
    return f"{100 * min(of):.0f} to {100 * max(of):.0f} %"


def test_the_decode_step_is_quoted() -> None:
    us = {(r["provider"], r["m"]): r["us"] for r in RECORDS if r["suite"] == "decode"}
    sizes, providers = (1, 16, 64), ("scaled_mm", "deepgemm", "flashinfer", "best", "normquant")
    assert us.keys() == {(provider, m) for provider in providers for m in sizes}
    expected = [row(provider, *(f"{us[provider, m]:.1f}" for m in sizes)) for provider in providers]
    assert table(section("A decode layer")) == [row("us a layer", *sizes), *expected]
