"""Gated products of vLLM: which arithmetic they have, seen for every gate that there is."""

from __future__ import annotations

import pytest
import torch
from shared.vllm_modules import SiluAndMul

from normquant.vllm.activation_modules import ActivationModule, activations, every_gate


def rows(k: int = 256, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(3, 2 * k, dtype=dtype)


def wrapped(module: torch.nn.Module) -> ActivationModule:
    (found,) = activations(torch.nn.ModuleDict({"act_fn": module}))
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [128, 384, 2304])
def test_every_gate_and_every_up_is_there(k: int, dtype: torch.dtype) -> None:
    every = every_gate(rows(k, dtype))
    assert every.shape[1] == 2 * k and every.dtype == dtype
    for half in every.view(torch.int16).chunk(2, dim=1):
        assert half.unique().numel() == 1 << 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("roundings", "rounding"), [(1, "once"), (2, "twice")])
def test_the_arithmetic_is_found(roundings: int, rounding: str, dtype: torch.dtype) -> None:
    module = wrapped(SiluAndMul(roundings))
    assert module.see(rows(384, dtype)) == ""
    assert module.arithmetic is not None and module.arithmetic.rounding == rounding


def test_one_gate_that_differs_is_seen() -> None:
    module = SiluAndMul()

    def forward(x: torch.Tensor) -> torch.Tensor:
        k = x.shape[1] // 2
        y = SiluAndMul.forward(module, x)
        return torch.where(x[:, :k] == 3.5, y.view(torch.int16).bitwise_xor(1).view(y.dtype), y)

    module.forward = forward  # type: ignore[method-assign]
    found = wrapped(module)
    assert found.see(rows()) == "its arithmetic is another: 1 of 65,536 values differ" and found.arithmetic is None


def test_a_width_that_has_no_whole_groups_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of the group"):
        wrapped(SiluAndMul()).see(rows(96))


def test_calls_with_more_than_rows_are_not_ours() -> None:
    module, x = wrapped(SiluAndMul()), rows()
    assert module.inputs(x) == (x,) and module.inputs(x=x) == (x,)
    assert module.inputs(x, 7.0) is None and module.inputs(x, limit=7.0) is None


def test_others_of_that_name_are_not_vllms() -> None:
    class Other(SiluAndMul):
        pass

    Other.__name__, Other.__module__ = "SiluAndMul", "somewhere.else"
    assert list(activations(torch.nn.ModuleDict({"act_fn": Other()}))) == []
