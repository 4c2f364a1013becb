"""The gated product of experts and its quantization in one kernel: what takes the form, and what keeps vLLM's."""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from normquant import ops
from normquant.compile.policy import Rules
from normquant.specs import VLLM, VLLM_UE8M0
from normquant.vllm import expert_products
from normquant.vllm.expert_products import ExpertProducts
from normquant.vllm.switches import Switches

M, K = 6, 128
CONFIG = {"quant_dtype": torch.float8_e4m3fn, "block_shape": [128, 128], "a1_scale": None, "per_act_token_quant": False}


class Kind(enum.Enum):
    SILU = "silu"
    GELU = "gelu"


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As vLLM's kernel does, whose clamp makes -448 of a NaN."""
    form = ops.group_quant(x, spec=VLLM_UE8M0)
    return torch.where(form.data.float().isnan(), -448.0, form.data.float()).to(form.data.dtype), form.scale


@pytest.fixture
def triton_moe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A module like vLLM's, whose experts write a gated product and quantize it; `quantized` counts."""
    module: Any = ModuleType("triton_moe_of_this_test")
    module.quantized = 0

    def moe_kernel_quantize_input(
        A: torch.Tensor, A_scale: Any, quant_dtype: Any, per_act_token_quant: bool, block_shape: Any = None, **more: Any
    ) -> Any:
        module.quantized += 1
        return quantize(A)

    class TritonExperts:
        def __init__(self, product: Callable[[torch.Tensor], torch.Tensor] = silu_and_mul) -> None:
            self.quant_config, self.product = SimpleNamespace(**CONFIG), product

        def activation(self, kind: Kind, output: torch.Tensor, input: torch.Tensor, **others: Any) -> None:
            output.copy_(self.product(input) if kind == Kind.SILU else input[:, :K])

        def apply(self, x: torch.Tensor, kind: Kind = Kind.SILU, then: Callable[..., Any] = lambda t: t) -> Any:
            written = torch.empty(len(x), K, dtype=x.dtype)
            self.activation(kind, written, x)
            rule = torch.float8_e4m3fn, False, [128, 128]
            form = module.moe_kernel_quantize_input(then(written), None, *rule, quantization_emulation=False)
            return written, *form

    TritonExperts.__module__ = module.__name__
    module.moe_kernel_quantize_input, module.TritonExperts = moe_kernel_quantize_input, TritonExperts
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(expert_products, "experts_rule", lambda: VLLM_UE8M0)
    yield module


def model_of(experts: Any) -> nn.Module:
    model = nn.Module()
    model.layer = nn.Module()
    model.layer.quant_method = SimpleNamespace(moe_kernel=SimpleNamespace(fused_experts=experts))
    return model


def rows(seed: int = 0, m: int = M) -> torch.Tensor:
    return torch.randn(m, 2 * K, generator=torch.Generator().manual_seed(seed)).bfloat16()


def started(experts: Any, **switches: Any) -> ExpertProducts:
    return ExpertProducts(model_of(experts), Switches(True, Rules("always"), **switches))


def same(given: Any, expected: Any) -> bool:
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(given, expected, strict=True))


@pytest.mark.parametrize("place", ["whole", "experts", "fallback_experts"])
def test_from_the_second_call_on_nothing_is_quantized_apart(triton_moe: Any, place: str) -> None:
    experts, stock = triton_moe.TritonExperts(), triton_moe.TritonExperts()
    expected = [stock.apply(rows(seed)) for seed in range(3)]
    started(experts if place == "whole" else SimpleNamespace(**{place: experts}))
    assert same(experts.apply(rows(0)), expected[0])
    before = triton_moe.quantized
    for seed in (1, 2):
        assert same(experts.apply(rows(seed)), expected[seed])
    assert triton_moe.quantized == before


def test_another_tensor_is_quantized_and_ends_what_was_left(triton_moe: Any) -> None:
    experts = triton_moe.TritonExperts()
    started(experts)
    experts.apply(rows())
    before = triton_moe.quantized
    written, data, scale = experts.apply(rows(1), then=lambda t: t.clone())
    assert triton_moe.quantized == before + 1 and "form" not in expert_products._left.__dict__
    assert same((data, scale), quantize(written))


def test_other_calls_are_vllms(triton_moe: Any) -> None:
    experts = triton_moe.TritonExperts()
    started(experts)
    experts.apply(rows())
    before = triton_moe.quantized
    experts.apply(rows(1), Kind.GELU)
    written = torch.empty(M, K, dtype=torch.bfloat16)
    experts.activation(Kind.SILU, written, rows(2), topk_ids=torch.zeros(1))
    triton_moe.moe_kernel_quantize_input(written, None, torch.float8_e4m3fn, False, [128, 128])
    experts.activation(Kind.SILU, written, rows(3))
    triton_moe.moe_kernel_quantize_input(written, None, torch.float8_e4m3fn, True, [128, 128])
    assert triton_moe.quantized == before + 3


def test_another_arithmetic_stays(triton_moe: Any, caplog: pytest.LogCaptureFixture) -> None:
    experts = triton_moe.TritonExperts(lambda x: silu_and_mul(x) * 1.0078125)
    started(experts)
    expected = triton_moe.TritonExperts(experts.product).apply(rows())
    assert same(experts.apply(rows()), expected) and "activation" not in vars(experts)
    assert "layer keeps vLLM's gated product: its product or the quantization has another arithmetic" in caplog.text


def test_a_failure_is_given_up_once(
    triton_moe: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    experts = triton_moe.TritonExperts()
    started(experts)
    expected = triton_moe.TritonExperts().apply(rows(1))
    experts.apply(rows())
    monkeypatch.setattr(expert_products, "OPS", {})
    assert same(experts.apply(rows(1)), expected) and "activation" not in vars(experts)
    assert caplog.text.count("layer goes on as vLLM has it: KeyError") == 1


def test_a_form_that_is_another_is_found_when_asked(
    triton_moe: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    experts = triton_moe.TritonExperts()
    started(experts, check=True)
    experts.apply(rows())
    run = expert_products.ExpertProduct.run

    def wrong(self: Any, output: torch.Tensor, x: torch.Tensor) -> None:
        run(self, output, x)
        output[0, 0] += 1.0

    monkeypatch.setattr(expert_products.ExpertProduct, "run", wrong)
    before = triton_moe.quantized
    experts.apply(rows(1))
    assert "the form of layer is another" in caplog.text and triton_moe.quantized == before + 2


def test_where_vllm_has_both_in_one_nothing_is_replaced(triton_moe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_products, "experts_rule", lambda: VLLM)
    experts = triton_moe.TritonExperts()
    started(experts)
    assert "activation" not in vars(experts)


def test_a_policy_may_leave_it(triton_moe: Any) -> None:
    experts = triton_moe.TritonExperts()
    ExpertProducts(model_of(experts), Switches(True, Rules("never")))
    experts.apply(rows())
    assert "activation" not in vars(experts)
