"""A row has one result: the same bits in every config, batch, stride, alignment and run."""

from functools import cache
from itertools import product

import pytest
import torch
from shared.compare import bits
from shared.inputs import weights

from normquant import QuantSpec, reference
from normquant.bench import cases
from normquant.kernels.configs import Config, _table, configs, write_row
from normquant.kernels.group_quant import group_quant
from normquant.kernels.rms_norm_quant import rms_norm_quant
from normquant.ops import OPS
from normquant.tune import launch_configs

KS = (1536, 7168)
MS = (1, 2, 16, 257, 4096, 16384)
CONFIGS = [Config(warps, split) for warps, split in product((4, 8, 16, 32), (1, 2, 4, 7, 8))]
CONFIGS += [Config(8, rows=4), Config(4, rows=2), Config(8, late_weight=True), Config(8, evict_first=True)]
CONFIGS += [
    Config(8, release="start"),
    Config(8, release="waited"),
    Config(8, keep_sum=True),
    Config(8, tiles=2),
    Config(16, tiles=3),
    Config(4, rows=2, tiles=2),
]
CONFIGS += [Config(warps, split, cluster=True) for split, warps in ((2, 16), (3, 8), (4, 8), (8, 1), (8, 2), (8, 4))]
CONFIGS += [Config(4, 8, cluster=True, prefetch=True), Config(8, 4, cluster=True, evict_first=True, keep_sum=True)]
# and all that are committed for any width of a norm
NORMS = [op for op in OPS.values() if "cluster" in op.choices]
CONFIGS = list(dict.fromkeys(CONFIGS + [c for op in NORMS for k in op.widths for c in configs(op.configs, k, (9, 0))]))
CONFIGS = [c for c in CONFIGS if c.rows * max(KS) / (32 * c.num_warps) <= 512]  # the others do not fit the registers
SPEC = QuantSpec(layout="row", rounding="twice")
PLAIN = Config(8, 1)


@cache
def inputs(m: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, residual, weight: a batch is the first m rows of the largest one."""
    generator = torch.Generator("cuda").manual_seed(k)
    x, residual = (
        torch.randn(max(MS), k, generator=generator, device="cuda", dtype=torch.bfloat16)[:m] for _ in range(2)
    )
    return x, residual, weights(k).cuda()


def norm(x, residual, weight, config=PLAIN):
    return rms_norm_quant(x, residual, weight, 1e-6, SPEC, 0.0, True, config)


@cache
def expected(m: int, k: int) -> tuple[torch.Tensor, ...]:
    return norm(*inputs(m, k))


def spread(t: torch.Tensor, stride: int, offset: int = 0) -> torch.Tensor:
    """The same values in rows `stride` apart, the first of them `offset` values into its memory."""
    m, k = t.shape
    memory = torch.full((m * stride + offset,), float("nan"), dtype=t.dtype, device=t.device)
    rows = memory.as_strided((m, k), (stride, 1), offset)
    return rows.copy_(t)


def assert_same(got, want) -> None:
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(bits(a), bits(b)), f"output {i}: {(bits(a) != bits(b)).sum()} of {a.numel()} differ"


@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: "-".join(map(str, write_row(0, c).values())))
def test_every_config_and_batch(config, k):
    for m in MS:
        x, residual, weight = inputs(m, k)
        assert_same(norm(x, residual, weight, config), expected(m, k))
        apart = spread(x, 2 * k + 16), spread(residual, 3 * k)
        assert_same(norm(*apart, weight, config), expected(m, k))


@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("config", [Config(4, 1), Config(8, 4), Config(32, 1)], ids=str)
def test_a_row_alone(config, k):
    x, residual, weight = inputs(4096, k)
    for i in (0, 1, 15, 256, 2048, 4095):
        rows = slice(i, i + 1)
        assert_same(norm(x[rows], residual[rows], weight, config), [t[rows] for t in expected(4096, k)])
    order = torch.randperm(4096, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    assert_same(norm(x[order], residual[order], weight, config), [bits(t)[order] for t in expected(4096, k)])


@pytest.mark.parametrize("k", KS)
def test_every_run(k):
    for _ in range(5):
        assert_same(norm(*inputs(4096, k)), expected(4096, k))


@pytest.mark.parametrize(("stride", "offset"), [(1, 0), (8, 1), (3, 5)], ids=["odd stride", "misaligned", "both"])
@pytest.mark.parametrize("config", [Config(8, 1), Config(16, 4)], ids=str)
def test_rows_that_are_not_aligned(config, stride, offset):
    k = 1536
    for m in (1, 2, 257):
        x, residual, weight = inputs(m, k)
        got = norm(spread(x, k + stride, offset), spread(residual, k + stride, offset), weight, config)
        assert_same(got, expected(m, k))


@pytest.mark.parametrize("config", [Config(4), Config(8, 4), Config(16, 2), Config(32, 7), Config(32, rows=2)], ids=str)
def test_group_quant(config):
    for m in MS:
        x, *_ = inputs(m, 7168)
        want = group_quant(x, SPEC, PLAIN)
        assert_same(group_quant(x, SPEC, config), want)
        assert_same(group_quant(spread(x, 7168 + 8), SPEC, config), want)
        assert_same(group_quant(x[m - 1 :], SPEC, config), [t[m - 1 :] for t in want])


@pytest.mark.parametrize(("op", "k"), [(op, int(k)) for op, widths in _table((9, 0)).items() for k in widths])
def test_every_committed_config_at_its_width(op, k):
    name, normed = op.removesuffix("_with_norm"), op.endswith("_with_norm")
    for m in (1, 3, 64, 257, 2048, 16384):
        case = cases.Case(name, m, k, normed)
        data = cases.inputs(case, 1)
        want = launch_configs.calls(case, PLAIN, data)[0]()
        for config in configs(op, k, (9, 0)):
            assert_same(launch_configs.calls(case, config, data)[0](), want)


def test_the_inputs_are_not_easy():
    # The order of the sum must matter on them, or equality would say nothing about it.
    h = inputs(4096, 7168)[0].float()
    assert (reference.sum_of_squares(h) != h.square().sum(-1, keepdim=True)).any()
