"""Models that torch.compile has had already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import normquant as nq

X = torch.randn(64, 256, dtype=torch.bfloat16)


def layer() -> nn.Module:
    return nq.block_fp8(nn.Sequential(nn.RMSNorm(256), nn.Linear(256, 128, bias=False)).bfloat16())


def by_torch(model: nn.Module, **how: Any) -> Any:
    return torch.compile(model, **how)


def in_place(model: nn.Module, **how: Any) -> Any:
    model.compile(**how)
    return model


def as_a_function(model: nn.Module, **how: Any) -> Any:
    return torch.compile(lambda x: model(x), **how)


@pytest.mark.parametrize("compiled", [by_torch, in_place, as_a_function])
def test_the_options_are_those_it_was_compiled_with(compiled: Callable[..., Any]) -> None:
    report = nq.audit(compiled(layer(), options=nq.inductor_options("always"), dynamic=True), X)
    assert [launch.name for launch in report.launches] == ["normquant.rms_norm_quant", "normquant.block_fp8_linear"]
    assert list(report.to_sizes().values()) == [64], "dynamic=True is kept"
    assert nq.audit(compiled(layer()), X).externs["normquant.group_quant"] == 1


def test_what_cannot_be_kept_is_refused() -> None:
    with pytest.raises(ValueError, match=r"compiled already.*give what was given to torch\.compile"):
        nq.audit(torch.compile(layer()), X, options=nq.inductor_options("always"))
    with pytest.raises(ValueError, match="another backend than Inductor"):
        nq.audit(torch.compile(layer(), backend="eager"), X)
    regional = nn.Sequential(layer(), nn.Identity())
    regional[0].compile()
    with pytest.raises(
        ValueError, match=r"1 of its parts are compiled on their own \(0, ...\).*returns \(model\.0, in"
    ):
        nq.audit(regional, X)
