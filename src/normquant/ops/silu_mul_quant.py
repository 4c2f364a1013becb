"""The gated product of an MLP and group quantization as one op."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch

from normquant import reference
from normquant.ops._examples import Examples
from normquant.ops._gradients import refuse_gradients
from normquant.ops._op import DEFAULT, Op, Traffic, register
from normquant.ops._tensors import ACTIVATION_BYTES, activation, check_limit, check_quant, fake_quant, rows
from normquant.spec import QuantizedActivation, QuantSpec

WIDTHS = (2304, 18432, 2048)  # DeepSeek-R1's dense MLP at TP8 and whole, and its expert


@overload
def silu_mul_quant(
    x: torch.Tensor, *, spec: QuantSpec = ..., limit: float | None = ..., return_product: Literal[False] = ...
) -> QuantizedActivation: ...


@overload
def silu_mul_quant(
    x: torch.Tensor, *, spec: QuantSpec = ..., limit: float | None = ..., return_product: Literal[True]
) -> tuple[QuantizedActivation, torch.Tensor]: ...


def silu_mul_quant(
    x: torch.Tensor, *, spec: QuantSpec = DEFAULT, limit: float | None = None, return_product: bool = False
) -> QuantizedActivation | tuple[QuantizedActivation, torch.Tensor]:
    """silu(gate) * up, quantized in groups, in one kernel.

    silu(g) = g / (1 + exp(-g)) in fp32; `spec.rounding` "twice" rounds it and the product to x's dtype, as an eager
    model does, "once" the product alone.

    limit: clamps first, as `swiglu_limit` of DeepSeek-V4 does: min(gate, limit), and up to [-limit, limit], both in x's
    dtype, in which it must be positive and finite. NaN stays NaN. None clamps nothing.
    x: [..., 2K] bfloat16 or float16, gate in the first K values and up in the others; the last stride is 1, rows may be
    any distance apart; K a multiple of the group. Returns [..., K].
    return_product: also return the product as [..., K] in x's dtype.

    Raises ValueError for anything else.
    """
    if torch.is_grad_enabled():  # DTensor hides from the op what requires grad
        refuse_gradients("silu_mul_quant", (x,))
    args = rows("x", x), limit, spec.encode()
    if not return_product:
        return activation(x.shape[:-1], torch.ops.normquant.silu_mul_quant(*args), spec)
    data, scale, product = torch.ops.normquant.silu_mul_quant_with_product(*args)
    return activation(x.shape[:-1], (data, scale), spec), product.view(*x.shape[:-1], product.shape[-1])


def _check(x: torch.Tensor, limit: float | None, spec: QuantSpec) -> None:
    """x must be [M, 2K] bf16 or fp16 with last stride 1 and K a positive multiple of spec.group; limit positive."""
    check_quant(x, spec)
    check_limit(limit, x.dtype)
    if x.shape[1] % (2 * spec.group):
        raise ValueError(
            f"x has {x.shape[1]} columns; gate and up must each have a multiple of the group, {spec.group}"
        )


def _example(e: Examples) -> dict[str, Any]:
    return {"x": e.rows(2 * e.k), "limit": e.limit}


def _sizes(x: torch.Tensor, limit: float | None) -> dict[str, Any]:
    return {"k": x.shape[-1] // 2, "limit": limit}


def _register(with_product: bool) -> None:
    """Define the op, with the product as an output or without."""

    def fake(x, limit, spec):
        m, k = x.shape[0], x.shape[1] // 2
        return *fake_quant(x, m, k, spec), *[x.new_empty((m, k))] * with_product

    def of_reference(x, limit, spec):
        return reference.silu_mul_quant(x, spec, limit)[: 2 + with_product]

    def plan(x, limit, spec, config=None):
        from normquant.kernels.silu_mul_quant import plan_silu_mul_quant

        return plan_silu_mul_quant(x, spec, config, limit, with_product)

    def traffic(m: int, k: int, spec: QuantSpec) -> Traffic:
        row = m * k * ACTIVATION_BYTES
        return 2 * row, spec.bytes(m, k) + row * with_product

    more = ", Tensor product" if with_product else ""
    register(
        Op(
            name="silu_mul_quant" + "_with_product" * with_product,
            schema=f"(Tensor x, float? limit, str spec) -> (Tensor data, Tensor scale{more})",
            check=_check,
            fake=fake,
            reference=of_reference,
            plan=plan,
            traffic=traffic,
            example=_example,
            sizes=_sizes,
            configs="silu_mul_quant",
            stem="silu_mul_quant",
            widths=WIDTHS,
        )
    )


for _with_product in (False, True):
    _register(_with_product)
