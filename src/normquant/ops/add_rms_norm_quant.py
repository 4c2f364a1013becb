"""RMSNorm of a residual sum and group quantization as one op, which also gives the sum."""

from __future__ import annotations

from typing import Literal, overload

import torch

from normquant import reference
from normquant.ops._examples import EPS
from normquant.ops._gradients import refuse_gradients
from normquant.ops._op import DEFAULT
from normquant.ops._tensors import activation, rows
from normquant.ops.rms_norm_quant import register_norm
from normquant.spec import QuantizedActivation, QuantSpec


@overload
def add_rms_norm_quant(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float = ...,
    *,
    spec: QuantSpec = ...,
    weight_offset: float = ...,
    return_norm: Literal[False] = ...,
) -> tuple[QuantizedActivation, torch.Tensor]: ...


@overload
def add_rms_norm_quant(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float = ...,
    *,
    spec: QuantSpec = ...,
    weight_offset: float = ...,
    return_norm: Literal[True],
) -> tuple[QuantizedActivation, torch.Tensor, torch.Tensor]: ...


def add_rms_norm_quant(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float = EPS,
    *,
    spec: QuantSpec = DEFAULT,
    weight_offset: float = 0.0,
    return_norm: bool = False,
) -> tuple[QuantizedActivation, torch.Tensor] | tuple[QuantizedActivation, torch.Tensor, torch.Tensor]:
    """RMSNorm of x + residual, quantized in groups, and the sum itself, in one kernel. Nothing is changed in place.

    As `rms_norm_quant` of h = x + residual, added in fp32; `spec.sum` says whether the norm reads h as it is or rounded
    to x's dtype. residual has x's shape and dtype.

    Returns the quantized norm, h rounded to x's dtype [..., K], and with return_norm the norm [..., K] in x's dtype.
    """
    if torch.is_grad_enabled():  # DTensor hides from the op what requires grad
        refuse_gradients("add_rms_norm_quant", (x, residual, weight))
    if residual.shape != x.shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}; it must be x's, {tuple(x.shape)}")
    args = (rows("x", x), rows("residual", residual), weight, eps, weight_offset, spec.encode())
    if not return_norm:
        data, scale, total = torch.ops.normquant.add_rms_norm_quant(*args)
        return activation(x.shape[:-1], (data, scale), spec), total.view(x.shape)
    data, scale, total, norm = torch.ops.normquant.add_rms_norm_quant_with_norm(*args)
    return activation(x.shape[:-1], (data, scale), spec), total.view(x.shape), norm.view(x.shape)


for _with_norm in (False, True):
    register_norm("add_rms_norm_quant", reference.add_rms_norm_quant, with_residual=True, with_norm=_with_norm)
