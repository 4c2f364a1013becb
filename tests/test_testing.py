"""`assert_generated`, for a model's own tests."""

from __future__ import annotations

import pytest
import torch
from shared.clean_graphs import GRAPHS, empty

from normquant.testing import assert_generated


def test_it_passes_and_gives_the_report() -> None:
    report = assert_generated(*GRAPHS["rms_norm"], expect={"kernels": 1, "triton_red_*": 1}, max_bytes=2_000_000)
    assert len(report.kernels) == 1


def test_it_says_all_that_does_not_hold() -> None:
    def stored_again(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.mm((x @ w).t().contiguous(), w)  # Inductor plans the copy in place, where it changes nothing

    def inputs() -> tuple[torch.Tensor, ...]:
        return empty(256, 256), empty(256, 256)

    with pytest.raises(AssertionError) as caught:
        assert_generated(*GRAPHS["rms_norm"], expect={"kernels": 2, "rms_norm_quant": 1}, max_bytes=1000)
    text = str(caught.value)
    assert "expected 2 of kernels, the code launches 1" in text and "expected 1 of rms_norm_quant" in text
    assert "at most 1000 are allowed" in text and "triton_red_fused" in text
    with pytest.raises(ValueError, match="unknown rule no-such"):
        assert_generated(*GRAPHS["rms_norm"], forbid=["no-such"])
    with pytest.raises(AssertionError, match=r"identity in triton_poi_.* stores it again, in place and unchanged"):
        assert_generated(stored_again, inputs)
    assert_generated(stored_again, inputs, forbid=["layout-copy"])
