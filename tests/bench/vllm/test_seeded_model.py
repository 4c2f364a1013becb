"""The model of `normquant bench vllm`: which of its layers have experts."""

from __future__ import annotations

import pytest

from normquant.bench.vllm.seeded_model import config


@pytest.mark.parametrize(("layers", "moe"), [(4, 0), (4, 4), (16, 4)])
def test_the_last_layers_have_experts(layers: int, moe: int):
    model = config(layers, moe)
    assert (model["num_hidden_layers"], model["first_k_dense_replace"]) == (layers, layers - moe)


@pytest.mark.parametrize(("layers", "moe"), [(4, 5), (4, -1), (0, 0)])
def test_more_experts_than_layers_are_refused(layers: int, moe: int):
    with pytest.raises(ValueError, match="layers with experts"):
        config(layers, moe)
