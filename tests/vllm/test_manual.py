"""The manual functions with vLLM's own QuantizedActivation and a linear kernel of vLLM's interface."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from normquant import ops, specs
from normquant.spec import QuantSpec
from normquant.specs import VLLM, VLLM_UE8M0


@pytest.fixture
def manual() -> Any:
    from normquant.vllm import manual

    return manual


def exact(*shape: int, seed: int = 0) -> torch.Tensor:
    return (torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)) / 4).bfloat16()


def layer(**quant: Any) -> SimpleNamespace:
    """A linear layer as vLLM's block-FP8 method leaves it, with a reference kernel."""

    class Kernel:
        apply_input_quant = True
        config = SimpleNamespace(out_dtype=torch.bfloat16)
        quant_fp8 = SimpleNamespace(
            **{
                "is_group_quant": True,
                "static": False,
                "group_size": 128,
                "use_ue8m0": False,
                "use_deep_gemm_supported": False,
                "column_major_scales": False,
                "tma_aligned_scales": False,
            }
            | quant
        )

        def _get_layer_params(self, layer: Any) -> Any:
            return SimpleNamespace(weight=layer.weight, weight_scale_inv=layer.weight_scale_inv, weight_scale=None)

        def apply_block_scaled_mm(self, A: Any, B: Any, As: Any, Bs: Any) -> torch.Tensor:
            x = A.float() * As.repeat_interleave(128, 1)
            return (x @ (B.float() * Bs.repeat_interleave(128, 0).repeat_interleave(128, 1)).t()).bfloat16()

    weight = exact(256, 512, seed=3).to(torch.float8_e4m3fn)
    return SimpleNamespace(
        weight=weight, weight_scale_inv=torch.full((2, 4), 0.5), quant_method=SimpleNamespace(fp8_linear=Kernel())
    )


def test_the_specs_are_the_named_ones(manual: Any) -> None:
    assert manual.VLLM == specs.VLLM


@pytest.mark.parametrize("shape", [(5, 512), (1, 512), (2, 3, 512), (0, 512)])
def test_norms_are_the_same_as_normquants(manual: Any, shape: tuple[int, ...]) -> None:
    from vllm.model_executor.layers.fusion.quant_activation import QuantizedActivation
    from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8Dynamic128Sym

    x, residual, weight = exact(*shape), exact(*shape, seed=1), exact(512, seed=2)
    expected, total = ops.add_rms_norm_quant(x, residual, weight, 1e-6, spec=VLLM)
    q, s = manual.add_rms_norm_quant(x, residual, weight, 1e-6)
    assert isinstance(q, QuantizedActivation) and q.quant_key == kFp8Dynamic128Sym
    assert (q.orig_dtype, q.orig_shape) == (torch.bfloat16, torch.Size(shape))
    assert torch.equal(q.data.float(), expected.data.float()) and torch.equal(q.scale, expected.scale)
    assert torch.equal(s, total) and torch.equal(s, (x.float() + residual.float()).bfloat16())
    alone = manual.rms_norm_quant(x, weight, 1e-6)
    assert torch.equal(alone.scale, ops.rms_norm_quant(x, weight, 1e-6, spec=VLLM).scale)


@pytest.mark.parametrize("shape", [(5, 512), (2, 3, 512)])
def test_a_layer_takes_what_was_quantized(manual: Any, shape: tuple[int, ...]) -> None:
    made, x = layer(), exact(*shape)
    q = manual.group_quant(x, spec=manual.input_spec(made))
    out = manual.block_linear(made, q, bias=torch.ones(256).bfloat16())
    assert out.shape == (*shape[:-1], 256) and out.dtype == torch.bfloat16
    expected = x.float() @ (made.weight.float() * 0.5).t() + 1
    assert (out.float() - expected).abs().max() <= 0.05 * expected.abs().max()
    gated = manual.silu_mul_quant(exact(*shape[:-1], 1024), spec=manual.input_spec(made))
    assert manual.block_linear(made, gated).shape == (*shape[:-1], 256)


@pytest.mark.parametrize(
    ("quant", "expected"),
    [
        ({}, VLLM),
        ({"column_major_scales": True}, VLLM.replace(layout="col")),
        ({"column_major_scales": True, "tma_aligned_scales": True}, VLLM.replace(layout="col_tma")),
        ({"use_ue8m0": True}, VLLM_UE8M0),
        ({"group_size": 64}, VLLM.replace(group=64)),
    ],
)
def test_the_layer_says_how_it_wants_its_input(manual: Any, quant: dict, expected: QuantSpec) -> None:
    assert manual.input_spec(layer(**quant)) == expected


def test_layers_without_such_a_kernel_are_refused(manual: Any) -> None:
    with pytest.raises(ValueError, match="Linear has no block-FP8 kernel"):
        manual.input_spec(torch.nn.Linear(2, 2))
    inside = layer()
    inside.quant_method.fp8_linear.apply_input_quant = False
    with pytest.raises(ValueError, match="takes bf16 and quantizes inside"):
        manual.block_linear(inside, manual.group_quant(exact(2, 512)))
    with pytest.raises(ValueError, match="groups of 128 or 64"):
        manual.input_spec(layer(group_size=32))
    with pytest.raises(ValueError, match="the group is 32; vLLM has keys for 128, 64"):
        manual.group_quant(exact(2, 512), spec=VLLM.replace(group=32))
