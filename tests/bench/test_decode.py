"""`normquant bench decode` without a GPU: who multiplies what, whether all compute the same, records, the command."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from shared import interpreter
from shared.decode_shards import TINY
from shared.products import pair_of
from torch._subclasses.fake_tensor import FakeTensorMode

from normquant.bench import decode, products, shard_step
from normquant.bench.cases import ADD_NORM, LATENTS, ROPE, SILU
from normquant.bench.comparison import compare
from normquant.bench.decode import BEST, CHECKED, PRODUCTS, TODAY, fastest, pair_or
from normquant.bench.products import OURS, ProductProvider
from normquant.bench.record_files import problems, read, writing
from normquant.bench.records import Provenance
from normquant.bench.shard_step import DEEPSEEK_R1, SPEC, DecodeStep, followed
from normquant.bench.timing import Timing
from normquant.cli import bench as command
from normquant.cli import entry as cli
from normquant.linear import choice, dequantized_linear
from normquant.linear.choice import Measured, ProductTable
from normquant.linear.pairs import Pair
from normquant.linear.split_product import split_product

H100 = (9, 0)
PROVENANCE = Provenance(
    gpu="an H100", torch="2.11.0", triton="3.6.0", version="0.1.0", command="normquant bench decode"
)
LONG = replace(TINY, hidden=7168)  # K of qkv_a and of gate_up is split
plain = partial(dequantized_linear, out_dtype=torch.bfloat16)
split = partial(split_product, dtype=torch.bfloat16)


def step(then: Callable[..., Any], shard=TINY, count: int = 2) -> DecodeStep:
    return DecodeStep(shard, shard_step.layers(shard, count, device="cpu"), decode.call, then)


def outputs(then: Callable[..., Any], shard=TINY, m: int = 3) -> list[torch.Tensor]:
    return [t.float() for t in shard_step.run(step(then, shard), shard_step.inputs(shard, m, "cpu"))]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def named(seen: list[str], name: str, multiply=plain) -> Callable[..., torch.Tensor]:
    """A product that says who it was."""

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        seen.append(name)
        return multiply(*tensors)

    return run


@pytest.fixture
def pairs_seen(monkeypatch) -> list[str]:
    """Ops whose pairs were called."""
    seen: list[str] = []

    def overload(pair: Pair) -> Any:
        seen.append(pair.op.name)
        return getattr(torch.ops.normquant, pair.name).default

    monkeypatch.setattr(Pair, "overload", property(overload))
    return seen


def a_table(us: dict[str, dict[str, float]]) -> ProductTable:
    """Times by op for every product of the tiny shard, of up to 16 rows."""
    sizes = [(LATENTS, 256, 272), (ROPE, 128, 160), (ADD_NORM, 128, 256), (SILU, 256, 256)]
    return ProductTable(H100, "", tuple(Measured(op, k, n, 1, 16, tuple(us[op].items())) for op, k, n in sizes))


@pytest.fixture
def measured(monkeypatch) -> None:
    """A table that a CPU is told."""
    table = a_table(
        {
            LATENTS: {OURS: 1.0, "a": 2.0, "b": 3.0},
            ROPE: {OURS: 3.0, "a": 2.0, "b": 1.0},
            ADD_NORM: {OURS: 1.0, "a": 3.0, "b": 2.0},
            SILU: {OURS: 2.0, "a": 1.0, "b": 3.0},
        }
    )
    monkeypatch.setattr(choice, "_capability", lambda device: H100)
    monkeypatch.setattr(choice, "measured", lambda capability: table)
    choice._choose.cache_clear()
    yield
    choice._choose.cache_clear()


def test_where_nothing_was_measured_the_product_is_the_other_one(pairs_seen: list[str]) -> None:
    assert same(outputs(pair_or(followed(plain, decode.call))), outputs(followed(plain, decode.call)))
    assert pairs_seen == []


@pytest.mark.parametrize("shard", [TINY, LONG], ids=["tiny", "split"])
def test_pairs_give_what_split_products_and_ops_give(shard, pairs_seen: list[str]) -> None:
    paired = outputs(pair_or(followed(plain, decode.call), "always"), shard)
    assert pairs_seen == 2 * [LATENTS, ROPE, ADD_NORM, SILU, ADD_NORM]
    assert same(paired, outputs(followed(split, decode.call), shard))
    assert same(paired, outputs(followed(plain, decode.call), shard)) == (shard is TINY)


def test_the_kernels_of_pairs_give_what_the_references_give() -> None:
    def then(op, data, scale, linear, *args):
        product = data, scale, linear.weight, linear.scale, torch.bfloat16, "always", ""
        return interpreter.call(pair_of, op, *product, *args, SPEC)

    assert same(outputs(then), outputs(pair_or(followed(plain, decode.call), "always")))


def test_many_rows_are_not_paired(pairs_seen: list[str]) -> None:
    seen: list[str] = []
    outputs(pair_or(followed(named(seen, "other"), decode.call), "always"), m=65)
    assert pairs_seen == [] and len(seen) == 10


def test_each_product_is_the_one_that_was_the_fastest(measured, pairs_seen: list[str]) -> None:
    seen: list[str] = []
    others = {name: named(seen, name) for name in ("b", "a")}
    layers = shard_step.layers(TINY, 2, device="cpu")
    inputs = shard_step.inputs(TINY, 3, "cpu")
    found = {}
    for name, of in decode.steps(layers, others).items():
        seen.clear()
        pairs_seen.clear()
        shard_step.run(replace(of, shard=TINY), inputs)
        found[name] = list(seen), list(pairs_seen)
    assert found == {
        "b": (["b"] * 10, []),
        "a": (["a"] * 10, []),
        BEST: (["a", "b", "b", "a", "b"] * 2, []),
        OURS: (["b", "a"] * 2, [LATENTS, ADD_NORM, ADD_NORM] * 2),
    }


def test_the_fastest_is_one_of_those_at_hand(measured) -> None:
    cpu = torch.device("cpu")
    assert fastest(LATENTS, 256, 272, 16, cpu, ("a", "b")) == "a"
    assert fastest(LATENTS, 256, 272, 16, cpu, ("b",)) == "b"
    with pytest.raises(ValueError, match="latent_norm_quant and its product: 17 rows; measured were 1 to 16"):
        fastest(LATENTS, 256, 272, 17, cpu, ("a",))
    with pytest.raises(ValueError, match=r"c not measured for K=256, N=272, M 1\.\.16: normquant 1 us, a 2 us"):
        fastest(LATENTS, 256, 272, 1, cpu, ("c",))


@pytest.mark.parametrize("m", [1, 16, 64])
def test_the_committed_table_knows_every_product(m, monkeypatch) -> None:
    monkeypatch.setattr(choice, "_capability", lambda device: H100)
    for k, n, op in PRODUCTS:
        for names in (tuple(TODAY), *((name,) for name in TODAY)):
            assert fastest(op, k, n, m, torch.device("cpu"), names) in names


def test_products_are_those_of_the_step() -> None:
    seen: list = []

    def then(op, data, scale, linear, *args):
        seen.append((data.shape[1], linear.weight.shape[0], op))
        return followed(plain, decode.call)(op, data, scale, linear, *args)

    with FakeTensorMode():
        shard_step.run(step(then, DEEPSEEK_R1, 1), shard_step.inputs(DEEPSEEK_R1, 2, "cpu"))
    assert seen == list(PRODUCTS)


def test_errors_are_those_of_rounding() -> None:
    def noisy(*tensors: torch.Tensor) -> torch.Tensor:
        exact = dequantized_linear(*tensors, torch.float32)
        return (exact + 1e-3 * torch.randn(exact.shape, generator=generator)).bfloat16()

    generator = torch.Generator().manual_seed(0)
    steps = {name: step(followed(of, decode.call), count=4) for name, of in (("plain", plain), ("noisy", noisy))}
    found = decode.checked_errors(steps, shard_step.inputs(TINY, 3, "cpu"))
    assert found["plain"] == 0 and 0.01 < found["noisy"] < 0.1


@pytest.mark.parametrize("which", range(5 * CHECKED))
@pytest.mark.parametrize("damage", [lambda out: out.roll(1, 1), lambda out: out * float("nan")], ids=["roll", "nan"])
def test_one_wrong_product_is_an_error(which: int, damage) -> None:
    def wrong(*tensors: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        out = plain(*tensors)
        return damage(out) if len(calls) == 1 + which else out

    calls: list = []
    steps = {"right": step(followed(plain, decode.call)), "wrong": step(followed(wrong, decode.call))}
    with pytest.raises(RuntimeError, match=r"after 2 layers above 0\.15: wrong (0\.|1\.|nan)"):
        decode.checked_errors(steps, shard_step.inputs(TINY, 16, "cpu"))


@pytest.fixture
def no_gpu_needed(monkeypatch) -> list[tuple[str, int]]:
    """A GPU on which the n-th step that is timed takes 8 n microseconds; gives their names and numbers of calls."""
    timed: list[tuple[str, int]] = []

    def time_calls(work: dict[str, Any], samples: int, sample_us: float) -> dict[str, Timing]:
        for name, calls in work.items():
            timed.append((name, len(calls)))
            calls[0]()
        return {name: Timing(8.0 * n, 8.0 * n - 1, 8.0 * n + 1, samples) for n, name in enumerate(work, 1)}

    monkeypatch.setattr(decode, "time_calls", time_calls)
    monkeypatch.setattr(decode, "current_run", lambda version: PROVENANCE)
    return timed


def records_of(m: int, measured: object) -> list[decode.DecodeRecord]:
    layers = shard_step.layers(TINY, 4, device="cpu")
    found = decode.steps(layers, {"a": plain, "b": split})
    steps = {name: replace(of, shard=TINY) for name, of in found.items()}
    return decode.decode_records(steps, shard_step.inputs(TINY, m, "cpu"), 9)


def test_a_record_has_the_time_of_a_layer(no_gpu_needed, measured, tmp_path: Path) -> None:
    records = records_of(3, measured)
    assert no_gpu_needed == [("a", 1), ("b", 1), (BEST, 1), (OURS, 1)]
    assert [(r.us, r.us_p10, r.us_p90) for r in records[:2]] == [(2.0, 1.75, 2.25), (4.0, 3.75, 4.25)]
    assert {(r.model, r.layers, r.m, r.samples) for r in records} == {("deepseek-r1", 4, 3, 9)}
    assert decode.line(records) == "deepseek-r1 m=3, us a layer: a 2.00  b 4.00  best 6.00  normquant 8.00"
    with writing(tmp_path / "records.jsonl") as add:
        add(records)
    written = list(read(tmp_path / "records.jsonl", ("us", "us_p10", "us_p90")))
    assert [problems(r) for r in written] == [[]] * 4 and written == [
        json.loads(json.dumps(asdict(r))) for r in records
    ]
    assert problems(written[0] | {"error": None}) == ["error is None"]


def test_records_of_two_numbers_of_tokens_are_two_cases(no_gpu_needed, measured) -> None:
    records = [asdict(r) for m in (1, 3) for r in records_of(m, measured)]
    changes, *missing = compare(records, records)
    assert len(changes) == len(records) == 8 and missing == [0, 0]
    assert changes[3].case == "normquant deepseek-r1 m=1"


def test_todays_products_are_those_of_the_linear_bench(monkeypatch) -> None:
    assert set(TODAY) == set(products.PRODUCT_PROVIDERS) - {OURS}
    started: list = []
    monkeypatch.setattr(products, "import_module", lambda name: name)
    monkeypatch.setattr(products, "start_early", started.append)
    monkeypatch.setattr(decode, "product_inputs", lambda case, sets: products.product_inputs(case, sets, "cpu"))
    assert list(decode.todays(("scaled_mm",))) == ["scaled_mm"] and started == []
    assert list(decode.todays(("scaled_mm", "deepgemm"))) == ["scaled_mm", "deepgemm"] and len(started) == 1
    monkeypatch.setitem(TODAY, "deepgemm", ProductProvider(lambda i: plain))
    assert decode.todays(("scaled_mm", "deepgemm"))["deepgemm"] is plain


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(["decode", *words])


@pytest.mark.parametrize(("words", "ms"), [((), (1, 16, 64)), (("--m", "4,2"), (4, 2))])
def test_the_command_measures_what_is_installed(words, ms, monkeypatch, capsys) -> None:
    def measure(*args):
        asked.append(args)
        return [[]] * len(args[0])

    asked: list = []
    monkeypatch.setattr(decode, "measure", measure)
    monkeypatch.setattr(decode, "line", lambda records: "a line")
    monkeypatch.setattr(
        decode, "TODAY", {"there": ProductProvider(print), "absent": ProductProvider(print, lambda: "x")}
    )
    args = parsed(*words, "--samples", "7")
    found = list(command.decode_suite(args))
    assert found == [([], "a line")] * len(ms) and len(found) == command.total(args)
    assert asked == [(ms, ["there"], 7)] and "absent: left out, x" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no provider is left"):
        list(command.decode_suite(parsed("--providers", "absent")))


def test_rows_that_were_not_measured_are_refused_before_anything_runs(measured) -> None:
    with pytest.raises(ValueError, match="no measurements of the product with latent_norm_quant for K=7168, N=2112"):
        next(decode.measure((1,), ("a",), 9))


def test_it_needs_a_gpu(capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "decode"]) == 2
    assert capsys.readouterr().err == "normquant: error: there is no CUDA GPU here; everything is measured on one\n"
