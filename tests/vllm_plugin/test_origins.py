"""Where a tensor comes from, as it is said of a reader that takes no form."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from normquant.vllm.first_forward import FirstForward
from normquant.vllm.origins import Origins

READER = "layers.0.mlp.down_proj"


class Layer(nn.Module):
    """run: its forward."""

    def __init__(self, run: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: torch.Tensor) -> Any:
        return self.run(x)


def model(run: Callable[[torch.Tensor], Any]) -> nn.Module:
    """A model whose layers.0.mlp.act_fn runs this."""
    layer = nn.ModuleDict({"mlp": nn.ModuleDict({"act_fn": Layer(run)})})
    return nn.ModuleDict({"layers": nn.ModuleList([layer])})


def origin(call: Callable[[nn.Module, torch.Tensor], torch.Tensor], run: Any = torch.tanh) -> str:
    """Where what `call` returns, from the model's only layer and a tensor, comes from."""
    built, x = model(run), torch.ones(4, 8)
    with torch.inference_mode(), FirstForward(built, (), ()) as first:
        result = call(built.get_submodule("layers.0.mlp.act_fn"), x)
    return first._origins.of(result, READER)


def fill(x: torch.Tensor) -> torch.Tensor:
    """As a kernel that gets a pointer."""
    y = torch.empty_like(x)
    ctypes.memset(y.data_ptr(), 0, y.numel() * y.element_size())
    return y


CASES: dict[str, tuple[Callable[[nn.Module, torch.Tensor], torch.Tensor], str]] = {
    "a module": (lambda layer, x: layer(x), "its input is what act_fn gives"),
    "a view of it": (lambda layer, x: layer(x).view(8, 4), "its input is what act_fn gives"),
    "a part of it": (lambda layer, x: layer(x)[:2], "its input is a part of what act_fn gives"),
    "an operation behind it": (lambda layer, x: layer(x) * 2, "its input is what aten.mul.Tensor gives"),
    "a write to it": (lambda layer, x: layer(x).mul_(2), "its input is what aten.mul_.Tensor gives"),
    "an argument that is filled": (
        lambda layer, x: torch.add(x, 1, out=torch.empty_like(x)),
        "its input is what aten.add.out gives",
    ),
    "a kernel alone": (lambda layer, x: fill(x), "its input is what a kernel that torch does not see gives"),
    "the model's input": (lambda layer, x: x.view(8, 4), "its input was there before the forward pass"),
}


@pytest.mark.parametrize("case", CASES)
def test_where_a_tensor_comes_from(case: str) -> None:
    call, expected = CASES[case]
    assert origin(call) == expected


def test_a_module_with_several_results_and_one_that_returns_its_input() -> None:
    assert origin(lambda layer, x: layer(x)[1], lambda x: (x + 1, x + 2)) == "its input is what act_fn gives"
    assert origin(lambda layer, x: layer(x + 1), lambda x: x) == "its input is what aten.add.Tensor gives"
    assert origin(lambda layer, x: layer(x), fill) == "its input is what act_fn gives"


def test_memory_that_is_used_again_has_a_new_origin() -> None:
    def call(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        for _ in range(50):
            layer(x)
            gc.collect(0)
        return x * 2

    assert origin(call) == "its input is what aten.mul.Tensor gives"


def test_nothing_is_watched_afterwards() -> None:
    built, before = model(torch.tanh), dict(nn.modules.module._global_forward_hooks)
    origins = Origins(built)
    origins.start()
    origins.stop()
    y = built.get_submodule("layers.0.mlp.act_fn")(torch.ones(4))
    assert origins.of(y, READER) == "its input was there before the forward pass"
    assert nn.modules.module._global_forward_hooks == before
