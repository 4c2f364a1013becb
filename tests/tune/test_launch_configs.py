"""The table of launch configs: what is measured, what is chosen, and what the kernels read back."""

import json

import pytest
import torch

from normquant.bench.cases import BENCHMARKED, MS, Case, kernel_cases
from normquant.bench.timing import Timing
from normquant.compile.policy import UNMEASURED
from normquant.kernels import configs, tiling
from normquant.kernels.configs import Config, write_row
from normquant.ops import OPS
from normquant.tune import launch_configs

A, B = Config(4), Config(8, 2)
ROWS = [{"up_to": 16, "num_warps": 8, "split": 2}, {"up_to": 64, "num_warps": 4}]
ADD_NORM, QUANT = "add_rms_norm_quant", "group_quant"


def us(a: float, b: float) -> dict[Config, Timing]:
    return {A: Timing(a, a, a, 1), B: Timing(b, b, b, 1)}


def test_the_fastest_config_is_chosen_for_each_range_of_rows():
    assert launch_configs.choose([(1, us(2, 1)), (16, us(2, 1)), (64, us(1, 2))]) == ROWS


def test_a_neighbour_within_the_noise_keeps_its_row():
    assert launch_configs.choose([(1, us(2, 1)), (16, us(1.0, 1.005)), (64, us(1, 2))]) == ROWS


def test_every_case_has_candidates_that_cover_its_row():
    for case in kernel_cases(BENCHMARKED, None, (1, 128, 4096)):
        found = list(launch_configs.candidates(case))
        assert found, case
        assert all(c.split == 1 or c.cluster for c in found) or case.m <= 128 or not case.definition.choices


def test_rows_are_tried_in_every_way_to_cut_them():
    for k, tilings in ((7168, {1, 2, 3}), (5120, {1, 2}), (1536, {1, 2}), (2048, {1})):
        found = list(launch_configs.candidates(Case(ADD_NORM, 1024, k)))
        assert {c.tiles for c in found} == tilings and {c.evict_first for c in found} == {False, True}
        assert len(set(found)) == len(found)
    assert all(
        c.tiles == 1
        for op in OPS.values()
        if op.configs and not op.choices
        for c in launch_configs.candidates(Case(op.name, 1024, 5120))
    )


def test_a_config_is_as_slow_as_under_the_slower_rule(monkeypatch):
    case = Case(ADD_NORM, 1024, 7168)
    ours, theirs = launch_configs.rules(case)
    assert (ours.sum, theirs.sum) == ("fp32", "rounded") and ours.layout == theirs.layout
    assert len(launch_configs.rules(Case(ADD_NORM, 16, 7168))) == len(launch_configs.rules(Case(QUANT, 1024, 512))) == 1
    slow = {(ours, A): 1.0, (theirs, A): 3.0, (ours, B): 2.0, (theirs, B): 2.0}
    monkeypatch.setattr(launch_configs, "inputs", lambda case, sets: [None])
    monkeypatch.setattr(launch_configs, "sets_of", lambda case, in_l2: 1)
    monkeypatch.setattr(launch_configs, "calls", lambda case, config, data: [lambda: slow[case.spec, config]])
    took = lambda calls: Timing(us := calls[0](), us, us, 1)  # noqa: E731
    monkeypatch.setattr(
        launch_configs, "time_calls", lambda work, *args: {name: took(calls) for name, calls in work.items()}
    )
    found = launch_configs.measure(case, 3, candidates=lambda case: [A, B])
    assert {config: timing.us for config, timing in found.items()} == {A: 3.0, B: 2.0}


@pytest.mark.parametrize(
    "config", [A, B, Config(1, 8, prefetch=True, release="start", cluster=True), Config(2, rows=4)]
)
def test_a_row_names_what_is_no_default(config):
    row = write_row(16, config)
    assert configs.read_row(row) == (16, config) and configs.read_row(json.loads(json.dumps(row))) == (16, config)
    assert all(value != Config.__dataclass_fields__[name].default for name, value in row.items() if name != "up_to")
    if config.cluster:
        assert list(row) == ["up_to", "num_warps", "split", "prefetch", "release", "cluster"]


def test_a_table_is_written_as_it_is_read(tmp_path, monkeypatch):
    table = {QUANT: {"512": [write_row(16, Config(2, 4)), write_row(64, A)], "7168": [write_row(16384, Config(8))]}}
    launch_configs.write(tmp_path / "config_tables" / "sm90.json", table)
    assert json.loads((tmp_path / "config_tables" / "sm90.json").read_text()) == table
    monkeypatch.setattr(configs.resources, "files", lambda _: tmp_path)
    configs.read_again()
    try:
        chosen = [configs.config(QUANT, 512, m, (9, 0)) for m in (1, 16, 17, 64, 10**9)]
    finally:
        configs.read_again()
    assert chosen == [Config(2, 4), Config(2, 4), Config(4, 1), Config(4, 1), Config(4, 1)]


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), None])
@pytest.mark.parametrize("case", [Case(op, m, k) for op in BENCHMARKED for k in (512, 1536, 7168, 3072) for m in MS])
def test_every_shape_has_a_config_on_every_gpu(case, capability):
    config = configs.config(case.op_name, case.k, case.m, capability)
    assert config.num_warps in (1, 2, 4, 8, 16, 32) and 1 <= config.split <= 16


def test_the_committed_table_covers_what_is_measured():
    table = configs._table((9, 0))
    for case in kernel_cases(tuple(op for op in BENCHMARKED if op not in UNMEASURED)):
        assert str(case.k) in table[case.op_name], case


def test_strides_and_rows():
    x = torch.empty(4, 24)
    assert tiling.stride_unit(x, None) == 8
    assert tiling.stride_unit(x, torch.empty(4, 20)) == 1
    assert tiling.stride_unit(torch.empty(1, 21)) == 8  # the stride of one row says nothing
