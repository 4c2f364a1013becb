"""Which config a launch gets, and how a row is cut into tiles."""

from dataclasses import replace

import pytest

from normquant import QuantSpec, specs
from normquant.kernels import configs, tiling
from normquant.kernels.capability import has_clusters
from normquant.kernels.configs import Config
from normquant.kernels.tiling import divided

H100 = (9, 0)


@pytest.mark.parametrize(
    ("groups", "tiles", "expected"),
    [(56, 1, (64,)), (56, 2, (32, 32)), (56, 3, (32, 16, 8)), (56, 9, (32, 16, 8)), (40, 2, (32, 8)), (64, 3, (64,))],
)
def test_tiles_are_powers_of_two_that_cover_the_row(groups, tiles, expected):
    row = divided(groups * 128, QuantSpec(), Config(4, tiles=tiles))
    assert (row.tiles, row.own, row.programs) == (expected, expected, 1)


def test_a_tile_holds_whole_elements_of_the_scale():
    for groups in range(1, 65):
        for tiles in (1, 2, 3):
            row = divided(groups * 128, specs.DEEPGEMM_PACKED, Config(4, tiles=tiles))
            assert sum(row.tiles) >= groups and row.own == row.tiles and row.programs == 1
            assert all(tile % 4 == 0 for tile in row.tiles)


def test_programs_that_share_a_row_read_it_whole():
    row = divided(7168, QuantSpec(), Config(4, 4))
    assert (row.tiles, row.own, row.programs) == ((64,), (16,), 4)


@pytest.mark.parametrize(
    "choices", [{"release": "late"}, {"split": 2, "tiles": 2}, {"cluster": True}, {"split": 16, "cluster": True}]
)
def test_choices_that_there_are_not(choices):
    with pytest.raises(ValueError):
        Config(4, **choices)


@pytest.mark.parametrize("capability", [H100, None])
@pytest.mark.parametrize("k", [512, 3072, 7168, 65536])
def test_the_sum_is_kept_as_long_as_it_is_small(k, capability):
    most = configs.KEPT_SUM // (2 * k)
    for m in (1, most - 1, most, most + 1, 4 * most):
        kept = configs.config("add_rms_norm_quant", k, m, capability)
        assert kept.keep_sum == (1 <= m <= most)
        assert not configs.config("rms_norm_quant", k, m, capability).keep_sum
        assert kept in configs.configs("add_rms_norm_quant", k, capability)


@pytest.mark.parametrize("op", ["add_rms_norm_quant", "rms_norm_quant_with_norm", "latent_norm_quant"])
@pytest.mark.parametrize("capability", [H100, (8, 9), None])
def test_a_shape_without_measurements_follows_the_rule(op, capability):
    few, many = (configs.config(op, 6144, m, capability) for m in (4, 4096))
    if op.startswith("latent"):
        assert few.split == 1 and few.num_warps > many.num_warps
    elif capability == H100:
        assert few == replace(Config(4, 8, cluster=True), keep_sum=few.keep_sum)
    else:
        assert few.split == 4 and not few.cluster and few.num_warps > many.num_warps
    assert divided(6144, QuantSpec(), many).tiles == (32, 16)


@pytest.mark.parametrize(("k", "split", "own", "programs"), [(7168, 8, 8, 7), (7168, 4, 16, 4), (512, 8, 1, 4)])
def test_programs_of_a_cluster_read_their_own_part(k, split, own, programs):
    config = Config(4, split, cluster=True)
    row = divided(k, QuantSpec(), config, clusters=True)
    assert (row.tiles, row.own, row.programs, row.cluster) == ((own,), (own,), programs, programs)
    assert divided(k, QuantSpec(), config) == replace(divided(k, QuantSpec(), Config(4, split)), cluster=1)


@pytest.mark.parametrize("capability", [H100, (8, 9), None])
@pytest.mark.parametrize("m", [1, 64, 4096])
def test_a_row_that_is_too_long_is_refused_however_it_is_divided(m, capability):
    config = configs.config("add_rms_norm_quant", 2 * tiling.MAX_ROW, m, capability)
    with pytest.raises(ValueError, match="take at most 65536"):
        divided(2 * tiling.MAX_ROW, QuantSpec(), config, has_clusters(capability))


def test_a_row_for_one_program_needs_no_cluster():
    assert divided(128, QuantSpec(), Config(4, 2, cluster=True), clusters=True).cluster == 1


def test_a_row_of_the_table_that_is_cut_keeps_its_config():
    rows = [(8, Config(1)), (512, Config(2)), (configs.sys.maxsize, Config(4))]
    cut = configs._keeping(64, rows)
    assert [(limit, c.num_warps, c.keep_sum) for limit, c in cut[:-1]] == [(8, 1, True), (64, 2, True), (512, 2, False)]
    assert configs._keeping(8, rows)[:2] == [(8, Config(1, keep_sum=True)), rows[1]]
