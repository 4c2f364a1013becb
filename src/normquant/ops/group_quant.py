"""Group quantization alone."""

from __future__ import annotations

from typing import Any

import torch

from normquant import reference
from normquant.ops._examples import Examples
from normquant.ops._gradients import refuse_gradients
from normquant.ops._op import DEFAULT, Op, Traffic, register
from normquant.ops._tensors import ACTIVATION_BYTES, activation, check_quant, fake_quant, rows
from normquant.spec import QuantizedActivation, QuantSpec


def group_quant(x: torch.Tensor, *, spec: QuantSpec = DEFAULT) -> QuantizedActivation:
    """x quantized in groups of `spec.group` neighbours of a row.

    x: [..., K] bfloat16 or float16; the last stride is 1, rows may be any distance apart; K a multiple of the group.
    A group of zeros gives the scale floor and zero data; a NaN makes its group NaN, or stays the only one, as
    `spec.nan` says; an inf gives a scale of inf or, by the same field, 2**127, NaN where x is inf and zero elsewhere.
    M = 0 gives empty outputs. Raises ValueError for anything else.
    """
    if torch.is_grad_enabled():  # DTensor hides from the op what requires grad
        refuse_gradients("group_quant", (x,))
    return activation(x.shape[:-1], torch.ops.normquant.group_quant(rows("x", x), spec.encode()), spec)


def _fake(x, spec):
    return fake_quant(x, x.shape[0], x.shape[1], spec)


def _plan(x, spec, config=None):
    from normquant.kernels.group_quant import plan_group_quant

    return plan_group_quant(x, spec, config)


def _traffic(m: int, k: int, spec: QuantSpec) -> Traffic:
    return m * k * ACTIVATION_BYTES, spec.bytes(m, k)


def _example(e: Examples) -> dict[str, Any]:
    return {"x": e.rows(e.k)}


def _sizes(x: torch.Tensor) -> dict[str, Any]:
    return {"k": x.shape[-1]}


register(
    Op(
        name="group_quant",
        schema="(Tensor x, str spec) -> (Tensor data, Tensor scale)",
        check=check_quant,
        fake=_fake,
        reference=reference.group_quant,
        plan=_plan,
        traffic=_traffic,
        example=_example,
        sizes=_sizes,
        configs="group_quant",
    )
)
