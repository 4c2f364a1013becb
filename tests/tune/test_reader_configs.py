"""Configs of ops that read partial sums, without a GPU: what is measured, what is written, and who reads it back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from normquant.bench.products import ProductCase, product_cases
from normquant.bench.timing import Timing
from normquant.kernels import configs
from normquant.kernels.configs import Config
from normquant.tune import launch_configs, reader_configs

H100 = (9, 0)
SILU, NORM = "silu_mul_quant", "add_rms_norm_quant"


def test_every_op_and_width_is_tuned_once() -> None:
    found = reader_configs.read(product_cases(models=["DeepSeek-R1"], ms=(64, 1)))
    assert [(c.reader, c.k, c.n, c.m) for c in found] == [
        *((NORM, 2304, 7168, m) for m in (1, 64)),  # not 2048x7168, whose reader is the same
        *(("latent_norm_quant", 7168, 2112, m) for m in (1, 64)),
        *((SILU, 7168, 4608, m) for m in (1, 64)),  # rope_last has one config for all
    ]


@pytest.mark.parametrize("case", reader_configs.read(product_cases(ms=(1, 64))), ids=str)
def test_no_candidate_lets_a_product_come_before_its_own_programs(case: ProductCase) -> None:
    found = reader_configs.candidates(case)
    assert len(found) == len(set(found)) > 2
    assert {config.release for config in found} == {"loaded"}
    assert not any(config.prefetch for config in found)  # partial sums are not there to be asked for


@pytest.fixture
def own_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installation whose tables lie in a folder of their own."""
    (tmp_path / "config_tables").mkdir()
    monkeypatch.setattr(configs.resources, "files", lambda _: tmp_path)
    configs.read_again()
    yield tmp_path / "config_tables" / "sm90.json"
    configs.read_again()


def test_what_is_written_is_for_partial_sums_alone(own_tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best = Config(2, 8)

    def measured(case: ProductCase, samples: int) -> dict[Config, Timing]:
        times = {Config(4, 4): 9.0, best: 8.0 if case.m == 1 else 8.95}
        return {config: Timing(us, us, us, samples) for config, us in times.items()}

    monkeypatch.setattr(reader_configs, "measure", measured)
    told: list[str] = []
    table = reader_configs.tune([ProductCase(7168, 4608, m, SILU) for m in (1, 16)], 5, told.append)
    assert [line.split(":")[0] for line in told] == [f"7168x4608 -> {SILU} m={m}" for m in (1, 16)]
    plain = {SILU: {"2304": [{"up_to": 64, "num_warps": 1}]}}
    launch_configs.write(own_tables, plain | table)
    configs.read_again()
    assert [configs.config(SILU, 2304, m, H100, of_parts=True) for m in (1, 16, 64)] == [best] * 3
    assert configs.config(SILU, 2304, 1, H100) == Config(1)


@pytest.mark.parametrize(("op", "k"), [(NORM, 7168), (NORM, 6144), (SILU, 512)])
@pytest.mark.parametrize("capability", [H100, (8, 9), None])
def test_without_a_row_the_next_kernel_comes_late(op: str, k: int, capability: tuple[int, int] | None) -> None:
    if configs.has_rows(op + configs.OF_PARTS, k, capability):
        pytest.skip("measured")
    for m in (1, 16, 64):
        plain = configs.config(op, k, m, capability)
        assert configs.config(op, k, m, capability, of_parts=True) == replace(plain, release="loaded")
