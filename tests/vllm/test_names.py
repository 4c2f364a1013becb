"""What the plugin knows of vLLM's modules by name, looked up in vLLM itself, and experts through its own classes."""

from __future__ import annotations

import inspect
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from normquant import ops
from normquant.specs import VLLM
from normquant.vllm import (
    activation_modules,
    expert_products,
    experts_op,
    first_forward,
    linear_inputs,
    norm_modules,
    quantizing_readers,
)
from normquant.vllm.handover import take
from normquant.vllm.quantizing_readers import ExpertsReader

M, K = 5, 256


@pytest.fixture(scope="module")
def vllm() -> Any:
    """vLLM's modules; importing them takes seconds."""
    import vllm  # noqa: F401  first, as its parts import each other
    from vllm.model_executor.kernels.linear.scaled_mm import BlockScaledMMLinearKernel, flashinfer
    from vllm.model_executor.layers import activation, layernorm
    from vllm.model_executor.layers.fused_moe import activation as moe_activation
    from vllm.model_executor.layers.fused_moe import config
    from vllm.model_executor.layers.fused_moe.experts import fallback, triton_moe
    from vllm.model_executor.layers.fused_moe.prepare_finalize import no_dp_ep
    from vllm.model_executor.layers.fused_moe.runner import moe_runner

    return SimpleNamespace(
        block=BlockScaledMMLinearKernel,
        flashinfer=flashinfer,
        layernorm=layernorm,
        activation=activation,
        config=config,
        no_dp_ep=no_dp_ep,
        moe_runner=moe_runner,
        moe_activation=moe_activation,
        triton_moe=triton_moe,
        fallback=fallback,
    )


def rows(seed: int = 0) -> torch.Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(seed)).bfloat16()


def test_modules_and_kernels_have_the_names_that_they_are_known_by(vllm: Any) -> None:
    for name in norm_modules.WEIGHT_OFFSETS:
        assert list(inspect.signature(getattr(vllm.layernorm, name).forward_native).parameters)[:3] == [
            "self",
            "x",
            "residual",
        ]
    gated = getattr(vllm.activation, activation_modules.GATED)
    assert list(inspect.signature(gated.forward_native).parameters)[-1:] == ["x"]
    base = getattr(vllm.block, linear_inputs.BASE)
    assert "apply_weights" in base.__dict__
    assert {"weight_scale_inv", "weight_scale"} <= set(inspect.get_annotations(vllm.block.FP8BlockParams))
    for name in (linear_inputs.FLASHINFER, linear_inputs.FLASHINFER_OR_DEEPGEMM):
        kernel = getattr(vllm.flashinfer, name)
        assert issubclass(kernel, base) and not kernel.apply_input_quant and "apply_weights" not in kernel.__dict__


def test_experts_get_their_input_where_the_reader_looks_for_it(vllm: Any) -> None:
    modular, monolithic = (getattr(vllm.no_dp_ep, name).prepare for name in quantizing_readers.PREPARES)
    names = [*inspect.signature(modular).parameters]
    assert names[1] == "a1" and names[6:9] == ["apply_router_weight_on_input", "quant_config", "defer_input_quant"]
    names = [*inspect.signature(monolithic).parameters]
    assert names[1:5] == ["a1", "router_logits", "quant_config", "defer_input_quant"]


def test_experts_write_and_quantize_their_gated_product_as_is_known(vllm: Any) -> None:
    experts = getattr(vllm.triton_moe, expert_products.EXPERTS)
    assert list(inspect.signature(experts.activation).parameters)[1:4] == ["activation", "output", "input"]
    quantize = inspect.signature(getattr(vllm.triton_moe, expert_products.QUANTIZE))
    assert list(quantize.parameters)[2:5] == list(expert_products.RULE)
    assert vllm.moe_activation.MoEActivation.SILU.value == "silu"
    source = inspect.getsource(experts.apply)
    written = source.index("self.activation(")
    taken = source.index(f"{expert_products.QUANTIZE}(", written)
    assert len(re.findall(r"\bintermediate_cache2\b", source[written:taken])) == 1, "something is done between both"
    assert "intermediate_cache2," in source[taken : taken + 120]
    made = inspect.getsource(vllm.fallback.FallbackExperts.__init__)
    assert "self.experts = " in made and "self.fallback_experts = " in made


@pytest.mark.parametrize("at", [0, 1], ids=["modular", "monolithic"])
def test_vllms_preparation_of_experts_takes_a_form(vllm: Any, monkeypatch: Any, at: int) -> None:
    def quantize(a: torch.Tensor, *args: Any, **kwargs: Any) -> Any:  # vLLM's own needs a GPU
        form = ops.group_quant(a, spec=VLLM)
        return form.data, form.scale

    monkeypatch.setattr(vllm.no_dp_ep, "moe_kernel_quantize_input", quantize)
    config = vllm.config.fp8_w8a8_moe_quant_config(torch.ones(1), torch.ones(1), block_shape=[128, 128])
    prepare = getattr(vllm.no_dp_ep, quantizing_readers.PREPARES[at])()
    given = (None, None, 1, None, False, config) if at == 0 else (torch.ones(M, 4), config)
    reader = ExpertsReader("experts", VLLM, prepare, "prepare", prepare.prepare)
    x = rows()
    assert reader.input(x, *given) is x and reader.unlike(x, *given) == ""
    form = ops.group_quant(x, spec=VLLM)
    read, stock = reader.read(form, x, *given), prepare.prepare(x, *given)
    assert len(read) == len(stock) and read[0] is form.data and read[1] is form.scale
    assert read[2:] == stock[2:]
    deferred = reader.input(x, *given, defer_input_quant=True)
    assert deferred is None
    per_tensor = vllm.config.fp8_w8a8_moe_quant_config(torch.ones(1), torch.ones(1))
    assert reader.input(x, *given[:-1], per_tensor) is None


@pytest.mark.parametrize("name", experts_op.NAMES)
def test_vllms_operation_of_experts_gets_a_tensor_that_carries_the_form(vllm: Any, monkeypatch: Any, name: str) -> None:
    found: list[Any] = []

    class Layer:
        def _forward_impl(self, x: torch.Tensor, router_logits: Any, shared: Any, input_ids: Any) -> Any:
            found.append((x, shared, take(x, VLLM)))
            return (x * 2, x * 3) if name == "moe_forward_shared" else x * 3

    monkeypatch.setattr(vllm.moe_runner, "get_layer_from_name", lambda layer_name: Layer())
    experts_op.define_ops()
    layer_name = vllm.moe_runner.LayerName("layers.0") if vllm.moe_runner._USE_LAYERNAME else "layers.0"
    op = getattr(torch.ops.normquant_vllm, name)
    with torch.inference_mode(), first_forward.FirstForward(nn.Module(), (), ()):  # which watches all operations
        x = rows() + 0
        form = ops.group_quant(x, spec=VLLM)
        out = op(x, form.data, form.scale, VLLM.encode(), torch.ones(M, 4), x, None, layer_name, 0)
    ((carrier, shared, taken),) = found
    assert shared is carrier and carrier.data_ptr() == x.data_ptr()
    assert taken is not None and taken.data is form.data
    assert take(carrier, VLLM) is None  # it was taken back
    assert torch.equal(out[-1] if isinstance(out, (tuple, list)) else out, x * 3)
