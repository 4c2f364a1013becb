"""The model of `normquant bench vllm`: which of its layers have experts."""

from __future__ import annotations

import pytest

from normquant.bench.vllm.seeded_model import SPLIT, config, share


@pytest.mark.parametrize(("layers", "moe"), [(4, 0), (4, 4), (16, 4)])
def test_the_last_layers_have_experts(layers: int, moe: int):
    model = config(layers, moe)
    assert (model["num_hidden_layers"], model["first_k_dense_replace"]) == (layers, layers - moe)


@pytest.mark.parametrize(("layers", "moe"), [(4, 5), (4, -1), (0, 0)])
def test_more_experts_than_layers_are_refused(layers: int, moe: int):
    with pytest.raises(ValueError, match="layers with experts"):
        config(layers, moe)


def test_every_rank_has_the_shard_of_one_of_eight():
    whole, four = config(4, 2), config(4, 2, ranks=4)
    assert share(four, 4) == whole and {n for n in whole if four[n] != whole[n]} == set(SPLIT)
