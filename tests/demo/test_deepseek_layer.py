"""The layer of the demonstration beside its twin in exact arithmetic."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: pip install 'normquant[hf]'")

from normquant.demo.deepseek_layer import Dims, build, float64_twin, forward, inputs, relative_error

TINY = Dims(hidden=256, intermediate=128, heads=2, q_lora=128, kv_lora=128, nope=32, rope=16, v_head=64)


def test_the_twin_is_the_layer_without_fp8() -> None:
    layer, tensors = build(TINY, "cpu"), inputs(TINY, 24, "cpu")
    with torch.no_grad():
        exact = forward(float64_twin(layer), *(t.double() for t in tensors))
        error = relative_error(forward(layer, *tensors), exact)
    assert exact.dtype == torch.float64
    assert 1e-3 < error < 0.1  # what FP8 costs, and no more: a wrong mask, norm or rotary embedding gives far more
