"""The gated product of an MLP and group quantization as one op."""

from __future__ import annotations

from typing import Any

import torch

from normquant import reference
from normquant.ops._examples import Examples
from normquant.ops._gradients import refuse_gradients
from normquant.ops._op import DEFAULT, Op, Traffic, register
from normquant.ops._tensors import ACTIVATION_BYTES, activation, check_limit, check_quant, fake_quant, rows
from normquant.spec import QuantizedActivation, QuantSpec

WIDTHS = (2304, 18432, 2048)  # DeepSeek-R1's dense MLP at TP8 and whole, and its expert


def silu_mul_quant(x: torch.Tensor, *, spec: QuantSpec = DEFAULT, limit: float | None = None) -> QuantizedActivation:
    """silu(gate) * up, quantized in groups, in one kernel.

    silu(g) = g / (1 + exp(-g)) in fp32; `spec.rounding` "twice" rounds it and the product to x's dtype, as an eager
    model does, "once" the product alone.

    limit: clamps first, as `swiglu_limit` of DeepSeek-V4 does: min(gate, limit), and up to [-limit, limit], both in x's
    dtype, in which it must be positive and finite. NaN stays NaN. None clamps nothing.
    x: [..., 2K] bfloat16 or float16, gate in the first K values and up in the others; the last stride is 1, rows may be
    any distance apart; K a multiple of the group. Returns [..., K]. Raises ValueError for anything else.
    """
    if torch.is_grad_enabled():  # DTensor hides from the op what requires grad
        refuse_gradients("silu_mul_quant", (x,))
    return activation(x.shape[:-1], torch.ops.normquant.silu_mul_quant(rows("x", x), limit, spec.encode()), spec)


def _check(x: torch.Tensor, limit: float | None, spec: QuantSpec) -> None:
    """x must be [M, 2K] bf16 or fp16 with last stride 1 and K a positive multiple of spec.group; limit positive."""
    check_quant(x, spec)
    check_limit(limit, x.dtype)
    if x.shape[1] % (2 * spec.group):
        raise ValueError(
            f"x has {x.shape[1]} columns; gate and up must each have a multiple of the group, {spec.group}"
        )


def _fake(x, limit, spec):
    return fake_quant(x, x.shape[0], x.shape[1] // 2, spec)


def _reference(x, limit, spec):
    return reference.silu_mul_quant(x, spec, limit)


def _plan(x, limit, spec, config=None):
    from normquant.kernels.silu_mul_quant import plan_silu_mul_quant

    return plan_silu_mul_quant(x, spec, config, limit)


def _traffic(m: int, k: int, spec: QuantSpec) -> Traffic:
    return 2 * m * k * ACTIVATION_BYTES, spec.bytes(m, k)


def _example(e: Examples) -> dict[str, Any]:
    return {"x": e.rows(2 * e.k), "limit": e.limit}


def _sizes(x: torch.Tensor, limit: float | None) -> dict[str, Any]:
    return {"k": x.shape[-1] // 2, "limit": limit}


register(
    Op(
        name="silu_mul_quant",
        schema="(Tensor x, float? limit, str spec) -> (Tensor data, Tensor scale)",
        check=_check,
        fake=_fake,
        reference=_reference,
        plan=_plan,
        traffic=_traffic,
        example=_example,
        sizes=_sizes,
        configs="silu_mul_quant",
        widths=WIDTHS,
    )
)
