"""`normquant tune --decode`: the step that is timed, the configs tried in it, what is chosen, and the rows written."""

import json
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from shared.decode_shards import TINY
from torch._subclasses.fake_tensor import FakeTensorMode

from normquant import reference
from normquant.bench import shard_step
from normquant.bench.cases import ADD_NORM, LATENTS, QUANT, ROPE, SILU
from normquant.bench.shard_step import DEEPSEEK_R1, SPEC
from normquant.cli import entry as cli
from normquant.kernels import configs, tiling
from normquant.kernels.configs import RELEASES, Config, read_row, write_row
from normquant.linear import dequantized_linear
from normquant.ops import Op
from normquant.tune import by_decode_step, decode_step, launch_configs
from normquant.tune.by_decode_step import BATCH, MARGIN_US, StepResult, Trial
from normquant.tune.decode_step import Gemm

H100 = (9, 0)
GEMM = Gemm("own", decode_step.own_gemm)
CONFIGS = {
    ADD_NORM: Config(4, 2, prefetch=True, release="start", keep_sum=True),
    LATENTS: Config(2, release="waited"),
    QUANT: Config(1),
    SILU: Config(8),
}
GRID = [(op, k, m) for op, k in DEEPSEEK_R1.widths.items() for m in (1, 16, 64, 256, 1024)]


def test_each_op_has_its_config(monkeypatch):
    def run(op, *args, config=None):
        seen.append((op.name, config))
        outputs = op.reference(*args)
        return (outputs,) if isinstance(outputs, torch.Tensor) else outputs

    seen: list = []
    monkeypatch.setattr(Op, "run", run)
    with FakeTensorMode():
        fake = Gemm("fake", partial(dequantized_linear, out_dtype=torch.bfloat16))
        layers = shard_step.layers(DEEPSEEK_R1, 2, fake.layout, "cpu")
        by_decode_step.run_with(layers, fake, shard_step.inputs(DEEPSEEK_R1, 5, "cpu"), CONFIGS)
    layer = [LATENTS, ROPE, QUANT, ADD_NORM, SILU, ADD_NORM]
    assert seen == [(op, CONFIGS.get(op)) for op in 2 * layer]


def test_deep_gemm_is_taken_wherever_it_lies(monkeypatch):
    calls: list = []
    module = SimpleNamespace(set_pdl=calls.append, fp8_gemm_nt=lambda *args, **named: calls.append((args, named)))
    monkeypatch.setitem(sys.modules, "deep_gemm", SimpleNamespace())  # one without this GEMM
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "vllm.third_party", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "vllm.third_party.deep_gemm", module)
    gemm = decode_step.find_gemm(H100)
    assert gemm.name == "DeepGEMM (vllm.third_party.deep_gemm)" and calls == [True]
    linear = shard_step.layers(TINY, 1, gemm.layout, "cpu")[0].down  # [256, 128]
    data, scale = reference.group_quant(torch.randn(3, 128), SPEC)
    out = gemm.run(data, scale, linear.weight, linear.scale)
    ((activation, weight, written), named) = calls[1]
    assert activation == (data, scale) and weight == (linear.weight, linear.scale)
    assert written is out and out.shape == (3, 256) and out.dtype == torch.bfloat16
    assert named == {"disable_ue8m0_cast": False}
    assert linear.scale.is_contiguous()


def test_without_deep_gemm_hopper_has_cublaslt_and_others_nothing(monkeypatch):
    for name in decode_step.DEEP_GEMM:
        monkeypatch.setitem(sys.modules, name, None)
    assert decode_step.find_gemm(H100).name.startswith("cuBLASLt")
    with pytest.raises(ValueError, match="needs a block-FP8 GEMM"):
        decode_step.find_gemm((8, 9))


@pytest.mark.parametrize("capability", [H100, None])
@pytest.mark.parametrize(("op", "k", "m"), GRID)
def test_candidates_are_configs_of_their_op(op, k, m, capability):
    present = configs.config(op, k, m, capability)
    found = by_decode_step.candidates(op, k, m, present)
    assert found[0] == present and len(set(found)) == len(found)
    assert {c.release for c in found} == set(RELEASES)
    assert {c.keep_sum for c in found} == {present.keep_sum}
    assert {c.prefetch for c in found[1:]} == ({False, True} if op == ADD_NORM and m <= 64 else {False})
    for config in found:
        if op in (ADD_NORM, LATENTS):
            row = tiling.divided(k, SPEC, config, clusters=True)
            assert sum(row.tiles) * row.cluster * 128 >= k and sum(row.own) * row.programs * 128 >= k
            assert (
                config == present or config.split == 1 or config.cluster or config.split * m <= launch_configs.PROGRAMS
            )
        else:
            block, programs = tiling.group_blocks(m, k, SPEC, config)
            assert block * programs * 128 >= m * k
        assert read_row(json.loads(json.dumps(write_row(m, config)))) == (m, replace(config, keep_sum=False))


@pytest.mark.parametrize(("op", "k", "m"), [case for case in GRID if case[2] <= 64])
def test_the_shapes_of_the_committed_table_are_among_the_candidates(op, k, m):
    present = configs.config(op, k, m, H100)
    shape = Config(present.num_warps, present.split, cluster=present.cluster)
    assert shape in by_decode_step.shapes(op, k, m)


@pytest.mark.parametrize("m", by_decode_step.DECODE_MS)
def test_a_number_of_tokens_is_a_matter_of_seconds(m):
    present = by_decode_step.present_configs(DEEPSEEK_R1.widths, m, H100)
    counts = [len(by_decode_step.candidates(op, k, m, present[op])) for op, k in DEEPSEEK_R1.widths.items()]
    assert sum(counts) <= 250  # of some 100 ms each


def test_every_config_is_timed_against_the_present_ones_of_its_batch():
    configs = [Config(4, 1 + i) for i in range(BATCH + 5)]
    seen: list = []

    def times(variants):  # every batch slower than the one before, and the present configs apart by 0.2 us
        slower = 10.0 * len(seen)
        seen.append([v[QUANT] for v in variants])
        others = [{op: c for op, c in v.items() if op != QUANT} for v in variants]
        assert all(other == {op: c for op, c in CONFIGS.items() if op != QUANT} for other in others)
        bases = iter((75.0, 75.1, 75.2))
        return [slower + (next(bases) if v == CONFIGS else 75.1 - 0.01 * v[QUANT].split) for v in variants]

    found = by_decode_step.trials(QUANT, configs, CONFIGS, times)
    assert [t.config for t in found] == configs
    assert [t.gain for t in found] == pytest.approx([0.01 * c.split for c in configs])
    assert [t.noise for t in found] == pytest.approx([0.2] * len(configs))
    assert [len(batch) for batch in seen] == [BATCH + 3, 5 + 3]
    for batch in seen:
        assert batch[0] == batch[-1] == CONFIGS[QUANT] and batch.count(CONFIGS[QUANT]) == 3


A, B, C = Config(4), Config(8, 2), Config(2, release="start")


@pytest.mark.parametrize(
    ("found", "chosen"),
    [
        ([Trial(A, 0.0, 0.01), Trial(B, 0.3, 0.1), Trial(C, 0.2, 0.1)], B),
        ([Trial(A, 0.0, 0.01), Trial(B, 0.3, 0.4), Trial(C, 0.2, 0.1)], C),  # the best one's batch is too noisy
        ([Trial(A, 0.0, 0.01), Trial(B, 0.3, 0.3), Trial(C, 0.2, 0.4)], A),
        ([Trial(A, 0.0, 0.0), Trial(B, MARGIN_US, 0.0), Trial(C, -1.0, 0.0)], A),
    ],
)
def test_a_config_must_win_by_more_than_the_noise_and_the_margin(found, chosen):
    assert by_decode_step.choose(found, A) == chosen


@pytest.mark.parametrize(("together_us", "kept"), [(72.7, False), (75.3, True)])
def test_the_chosen_configs_are_taken_where_they_win_together(together_us, kept):
    present = {**by_decode_step.present_configs(DEEPSEEK_R1.widths, 64, H100), QUANT: Config(4, 2)}
    faster = Config(8, 2, release="start")

    def times(variants):
        return [75.0 - (v[QUANT] == faster) for v in variants]

    def together(variants):
        assert variants == [present, {**present, QUANT: faster}]
        return [75.0, together_us]

    said: list[str] = []
    result = by_decode_step.tune_rows(64, DEEPSEEK_R1.widths, present, times, together, said.append)
    assert result == StepResult(64, 75.0, together_us, present if kept else {**present, QUANT: faster})
    assert said[-1] == f"m=64: 75.0 us a layer, {together_us} with the chosen configs" + (
        ", which are left out" if kept else ""
    )
    assert len(said) == 5 and f"{faster} saves 1.00 us a layer, noise 0.00" in said[2]
    assert "stays" in said[0] and said[0].startswith("add_rms_norm_quant k=7168 m=64: ")


def test_the_chosen_configs_that_are_the_present_ones_are_not_left_out():
    present = by_decode_step.present_configs(DEEPSEEK_R1.widths, 1, H100)
    said: list[str] = []
    level = lambda variants: [75.0] * len(variants)  # noqa: E731
    assert by_decode_step.tune_rows(1, DEEPSEEK_R1.widths, present, level, level, said.append).configs == present
    assert said[-1] == "m=1: 75.0 us a layer, 75.0 with the chosen configs"


def rows_of(*rows: tuple[int, Config]) -> list[dict]:
    return [write_row(up_to, config) for up_to, config in rows]


D = Config(16)
E = Config(2)


@pytest.mark.parametrize(
    ("rows", "measured", "expected"),
    [
        # rows up to the largest measured M are replaced, the others stay
        (
            rows_of((8, E), (64, A), (512, Config(8))),
            [(1, A), (16, B), (64, C)],
            rows_of((1, A), (16, B), (64, C), (512, Config(8))),
        ),
        # the row that straddles it is cut
        (
            rows_of((8, E), (256, D), (512, Config(8))),
            [(16, B)],
            rows_of((16, B), (256, D), (512, Config(8))),
        ),
        # the last row held for all M beyond it, and does so still
        (rows_of((8, E), (16, D)), [(16, A), (64, B)], rows_of((16, A), (64, B), (65, D))),
        # neighbours with one config are one row, below the largest measured M and across it
        (rows_of((8, E), (256, B)), [(1, A), (16, A), (64, B)], rows_of((16, A), (256, B))),
        # what is added by a rule is no part of a row
        (rows_of((8, E)), [(8, replace(A, keep_sum=True))], rows_of((8, A), (9, E))),
    ],
)
def test_rows_are_merged(rows, measured, expected):
    before = json.dumps(rows)
    assert by_decode_step.merged_rows(rows, measured) == expected
    assert json.dumps(rows) == before


def test_the_merged_table_is_what_the_kernels_get(tmp_path, monkeypatch):
    ops = DEEPSEEK_R1.widths
    before = {(op, m): configs.config(op, k, m, H100) for op, k in ops.items() for m in (65, 128, 300, 4096, 10**6)}
    present = {m: by_decode_step.present_configs(ops, m, H100) for m in (1, 64)}
    released = {m: {op: replace(c, release="start") for op, c in configs.items()} for m, configs in present.items()}
    found = [StepResult(m, 2.0, 1.0, configs) for m, configs in released.items()]
    table = {
        QUANT: {"512": rows_of((16, Config(2, 4)))},
        LATENTS: configs._table(H100)[LATENTS],
    }
    merged = by_decode_step.merged(table, found, ops, H100)  # two of the ops are not in this table
    assert merged[QUANT]["512"] == rows_of((16, Config(2, 4))) and "2048" not in table[QUANT]
    launch_configs.write(tmp_path / "config_tables" / "sm90.json", merged)
    monkeypatch.setattr(configs.resources, "files", lambda _: tmp_path)
    configs._table.cache_clear()
    configs._rows.cache_clear()
    try:
        for op, k in ops.items():
            assert configs.config(op, k, 1, H100) == released[1][op]
            assert all(configs.config(op, k, m, H100) == released[64][op] for m in (2, 16, 64))
        assert before == {(op, m): configs.config(op, ops[op], m, H100) for op, m in before}
    finally:
        configs._table.cache_clear()
        configs._rows.cache_clear()


def test_decode_and_strategies_exclude_each_other(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["tune", "--decode", "--strategies"])
    assert "not allowed with argument" in capsys.readouterr().err


@pytest.mark.parametrize("extra", [["--l2"], ["--ops", QUANT], ["--k", "7168"]])
def test_decode_takes_no_choice_of_cases(capsys, extra):
    assert cli.main(["tune", "--decode", *extra]) == 2
    assert "takes no --ops, --k or --l2" in capsys.readouterr().err


def test_decode_needs_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["tune", "--decode"]) == 2
    assert capsys.readouterr().err == "normquant: error: there is no CUDA GPU here; everything is measured on one\n"


@pytest.mark.parametrize(
    ("extra", "ms", "replays"), [([], (1, 16, 64), 100), (["--m", "4,2", "--samples", "7"], (4, 2), 7)]
)
def test_the_command_writes_what_was_chosen(tmp_path, capsys, monkeypatch, extra, ms, replays):
    asked = []

    def measured(ms, replays, gemm, progress):
        asked.append((ms, replays, gemm))
        progress("m=1: 75.0 us a layer, 72.7 with the chosen configs")
        return [StepResult(1, 75.0, 72.7, CONFIGS)]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: H100)
    monkeypatch.setattr(decode_step, "find_gemm", lambda capability: GEMM)
    monkeypatch.setattr(by_decode_step, "precompile", lambda ms, capability, told: None)
    monkeypatch.setattr(by_decode_step, "tune", measured)
    path = tmp_path / "sm90.json"
    assert cli.main(["tune", "--decode", "--output", str(path), *extra]) == 0
    assert asked == [(ms, replays, GEMM)]
    assert "72.7 with the chosen configs" in capsys.readouterr().out
    table = json.loads(path.read_text())
    assert {op: int(k) for op, rows in table.items() for k in rows} == DEEPSEEK_R1.widths
    first = {"up_to": 1, "num_warps": 4, "split": 2, "prefetch": True, "release": "start"}
    assert table[ADD_NORM]["7168"][0] == first
