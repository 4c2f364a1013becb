"""RMSNorm and group quantization as one op, and what the op shares with the one that adds a residual before."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch

from normquant import reference
from normquant.ops._examples import EPS, Examples
from normquant.ops._gradients import refuse_gradients
from normquant.ops._op import DEFAULT, Impl, Op, Traffic, register
from normquant.ops._tensors import (
    ACTIVATION_BYTES,
    activation,
    check_eps,
    check_norm,
    check_weight_offset,
    fake_quant,
    rows,
)
from normquant.spec import QuantizedActivation, QuantSpec

CHOICES = ("prefetch", "late_weight", "evict_first", "tiles", "cluster")


@overload
def rms_norm_quant(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = ...,
    *,
    spec: QuantSpec = ...,
    weight_offset: float = ...,
    return_norm: Literal[False] = ...,
) -> QuantizedActivation: ...


@overload
def rms_norm_quant(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = ...,
    *,
    spec: QuantSpec = ...,
    weight_offset: float = ...,
    return_norm: Literal[True],
) -> tuple[QuantizedActivation, torch.Tensor]: ...


def rms_norm_quant(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = EPS,
    *,
    spec: QuantSpec = DEFAULT,
    weight_offset: float = 0.0,
    return_norm: bool = False,
) -> QuantizedActivation | tuple[QuantizedActivation, torch.Tensor]:
    """RMSNorm of x, quantized in groups, in one kernel.

    y = x / sqrt(mean(x**2) + eps) * (weight + weight_offset), rounded as `spec.rounding` says, then quantized as
    `QuantSpec` says; every step in fp32 (the arithmetic is `normquant.reference.rms_norm_quant`).

    x: [..., K] bfloat16 or float16; the last stride is 1, rows may be any distance apart.
    weight: [K] bfloat16, float16 or float32, contiguous.
    eps: positive; weight_offset: finite, added to the weight in fp32; 1.0 for Gemma.
    return_norm: also return y as [..., K] in x's dtype.

    A row of zeros gives the scale floor and zero data. A NaN makes all data of its row NaN, and the scales what
    `spec.nan` says. A row whose sum of squares overflows fp32 has rstd 0: it counts as zeros, but an inf becomes NaN.
    K must be a multiple of `spec.group`; M = 0 gives empty outputs. Raises ValueError for anything else.
    """
    if torch.is_grad_enabled():  # DTensor hides from the op what requires grad
        refuse_gradients("rms_norm_quant", (x, weight))
    flat = rows("x", x)
    args = (flat, weight, eps, weight_offset, spec.encode())
    if not return_norm:
        return activation(x.shape[:-1], torch.ops.normquant.rms_norm_quant(*args), spec)
    data, scale, norm = torch.ops.normquant.rms_norm_quant_with_norm(*args)
    return activation(x.shape[:-1], (data, scale), spec), norm.view(x.shape)


def register_norm(stem: str, oracle: Impl, with_residual: bool, with_norm: bool) -> Op:
    """The op of these inputs and outputs; `oracle` is the function of `normquant.reference`."""
    outputs = ["Tensor data", "Tensor scale"] + ["Tensor sum"] * with_residual + ["Tensor norm"] * with_norm
    inputs = "Tensor x, " + "Tensor residual, " * with_residual + "Tensor weight, float eps, float weight_offset"

    def split(args):  # -> x, residual or None, weight, eps, weight_offset, and the spec where it is among them
        return args if with_residual else (args[0], None, *args[1:])

    def check(*args):
        x, residual, weight, eps, offset, spec = split(args)
        check_norm(x, residual, weight, spec)
        check_eps(eps)
        check_weight_offset(offset)

    def fake(x, *args):
        return *fake_quant(x, x.shape[0], x.shape[1], args[-1]), *(x.new_empty(x.shape) for _ in outputs[2:])

    def of_reference(*args):
        *tensors, eps, offset, spec = args
        return oracle(*tensors, eps, spec, offset)[: len(outputs)]

    def plan(*args, config=None):
        from normquant.kernels.rms_norm_quant import plan_rms_norm_quant

        x, residual, weight, eps, offset, spec = split(args)
        return plan_rms_norm_quant(x, residual, weight, eps, spec, offset, with_norm, config)

    def traffic(m: int, k: int, spec: QuantSpec, *, weight_bytes: int = ACTIVATION_BYTES) -> Traffic:
        row = m * k * ACTIVATION_BYTES
        return row * (1 + with_residual) + k * weight_bytes, spec.bytes(m, k) + row * (with_residual + with_norm)

    def example(e: Examples) -> dict[str, Any]:
        activations = {"x": e.rows(e.k)} | ({"residual": e.rows(e.k)} if with_residual else {})
        return activations | {"weight": e.weight(e.k), "eps": EPS, "weight_offset": e.weight_offset}

    def sizes(*args):
        x, _, weight, _, weight_offset = split(args)
        return {"k": x.shape[-1], "weight_dtype": weight.dtype, "weight_offset": weight_offset}

    name = f"{stem}_with_norm" if with_norm else stem
    return register(
        Op(
            name=name,
            schema=f"({inputs}, str spec) -> ({', '.join(outputs)})",
            check=check,
            fake=fake,
            reference=of_reference,
            plan=plan,
            traffic=traffic,
            example=example,
            sizes=sizes,
            configs=name,
            stem=stem,
            choices=(*CHOICES, "keep_sum") if with_residual else CHOICES,
            eps_overload=True,
        )
    )


for _with_norm in (False, True):
    register_norm("rms_norm_quant", reference.rms_norm_quant, with_residual=False, with_norm=_with_norm)
