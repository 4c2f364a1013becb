"""The ops as torch sees them, and the functions that a user calls.

Every op is functional, has a fixed number of outputs and takes its QuantSpec as the string `spec.encode()`, so that it can
stand in a compiled graph. On CUDA it runs a Triton kernel, on CPU the reference; the fake implementation gives the same
shapes, strides and dtypes. Ops take x as [M, K]; the functions below take any leading dimensions.
"""

from __future__ import annotations

import torch

from normquant import reference
from normquant.checks import check_norm, check_quant, rows
from normquant.spec import QuantizedActivation, QuantSpec

LIBRARY = torch.library.Library("normquant", "DEF")
DEFAULT = QuantSpec()

_NORM = "Tensor x, Tensor weight, float eps, float weight_offset, str spec"
_ADD = "Tensor x, Tensor residual, Tensor weight, float eps, float weight_offset, str spec"
SCHEMAS = {
    "rms_norm_quant": f"({_NORM}) -> (Tensor data, Tensor scale)",
    "rms_norm_quant_with_norm": f"({_NORM}) -> (Tensor data, Tensor scale, Tensor norm)",
    "add_rms_norm_quant": f"({_ADD}) -> (Tensor data, Tensor scale, Tensor sum)",
    "add_rms_norm_quant_with_norm": f"({_ADD}) -> (Tensor data, Tensor scale, Tensor sum, Tensor norm)",
    "group_quant": "(Tensor x, str spec) -> (Tensor data, Tensor scale)",
}


def _impl(op: str, key: str):
    """Register the decorated function as the implementation of `op` for a dispatch key; "Meta" is its fake."""

    def register(fn):
        if key == "Meta":
            torch.library.register_fake(f"normquant::{op}", fn, lib=LIBRARY)
        else:
            LIBRARY.impl(op, fn, key)
        return fn

    return register


for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))


def _fake_quant(x: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
    m, k = x.shape
    scale = x.new_empty_strided(spec.scale_shape(m, k), spec.scale_stride(m, k), dtype=spec.scale_dtype)
    return x.new_empty((m, k), dtype=spec.dtype), scale


def _fake_norm(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, spec: str):
    check_norm(x, residual, weight, QuantSpec.decode(spec))
    return _fake_quant(x, QuantSpec.decode(spec))


def _cuda_norm(x, residual, weight, eps, weight_offset, spec, return_norm):
    from normquant.kernels.rms_norm_quant import rms_norm_quant

    check_norm(x, residual, weight, QuantSpec.decode(spec))
    return rms_norm_quant(x, residual, weight, eps, QuantSpec.decode(spec), weight_offset, return_norm)


@_impl("rms_norm_quant", "Meta")
def _(x, weight, eps, weight_offset, spec):
    return _fake_norm(x, None, weight, spec)


@_impl("rms_norm_quant_with_norm", "Meta")
def _(x, weight, eps, weight_offset, spec):
    return *_fake_norm(x, None, weight, spec), x.new_empty(x.shape)


@_impl("add_rms_norm_quant", "Meta")
def _(x, residual, weight, eps, weight_offset, spec):
    return *_fake_norm(x, residual, weight, spec), x.new_empty(x.shape)


@_impl("add_rms_norm_quant_with_norm", "Meta")
def _(x, residual, weight, eps, weight_offset, spec):
    return *_fake_norm(x, residual, weight, spec), x.new_empty(x.shape), x.new_empty(x.shape)


@_impl("group_quant", "Meta")
def _(x, spec):
    check_quant(x, QuantSpec.decode(spec))
    return _fake_quant(x, QuantSpec.decode(spec))


@_impl("rms_norm_quant", "CPU")
def _(x, weight, eps, weight_offset, spec):
    check_norm(x, None, weight, QuantSpec.decode(spec))
    return reference.rms_norm_quant(x, weight, eps, QuantSpec.decode(spec), weight_offset)[:2]


@_impl("rms_norm_quant_with_norm", "CPU")
def _(x, weight, eps, weight_offset, spec):
    check_norm(x, None, weight, QuantSpec.decode(spec))
    return reference.rms_norm_quant(x, weight, eps, QuantSpec.decode(spec), weight_offset)


@_impl("add_rms_norm_quant", "CPU")
def _(x, residual, weight, eps, weight_offset, spec):
    check_norm(x, residual, weight, QuantSpec.decode(spec))
    return reference.add_rms_norm_quant(x, residual, weight, eps, QuantSpec.decode(spec), weight_offset)[:3]


@_impl("add_rms_norm_quant_with_norm", "CPU")
def _(x, residual, weight, eps, weight_offset, spec):
    check_norm(x, residual, weight, QuantSpec.decode(spec))
    return reference.add_rms_norm_quant(x, residual, weight, eps, QuantSpec.decode(spec), weight_offset)


@_impl("group_quant", "CPU")
def _(x, spec):
    check_quant(x, QuantSpec.decode(spec))
    return reference.group_quant(x, QuantSpec.decode(spec))


@_impl("rms_norm_quant", "CUDA")
def _(x, weight, eps, weight_offset, spec):
    return _cuda_norm(x, None, weight, eps, weight_offset, spec, False)[:2]


@_impl("rms_norm_quant_with_norm", "CUDA")
def _(x, weight, eps, weight_offset, spec):
    data, scale, _, norm = _cuda_norm(x, None, weight, eps, weight_offset, spec, True)
    return data, scale, norm


@_impl("add_rms_norm_quant", "CUDA")
def _(x, residual, weight, eps, weight_offset, spec):
    return _cuda_norm(x, residual, weight, eps, weight_offset, spec, False)[:3]


@_impl("add_rms_norm_quant_with_norm", "CUDA")
def _(x, residual, weight, eps, weight_offset, spec):
    return _cuda_norm(x, residual, weight, eps, weight_offset, spec, True)


@_impl("group_quant", "CUDA")
def _(x, spec):
    from normquant.kernels.group_quant import group_quant

    check_quant(x, QuantSpec.decode(spec))
    return group_quant(x, QuantSpec.decode(spec))


def _activation(x: torch.Tensor, data: torch.Tensor, scale: torch.Tensor, spec: QuantSpec) -> QuantizedActivation:
    lead = x.shape[:-1]
    return QuantizedActivation(data.view(x.shape), scale.view(*lead, scale.shape[-1]), spec)


def rms_norm_quant(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
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
    weight_offset: added to the weight in fp32; 1.0 for Gemma.
    return_norm: also return y as [..., K] in x's dtype.

    A row of zeros gives the scale floor and zero data. A NaN makes its whole row NaN, data and scales. A row whose sum
    of squares overflows fp32 has rstd 0: it counts as zeros, except that an inf makes its group NaN.
    K must be a multiple of `spec.group`; M = 0 gives empty outputs. Raises ValueError for anything else.
    """
    flat = rows("x", x)
    args = (flat, weight, eps, weight_offset, spec.encode())
    if not return_norm:
        return _activation(x, *torch.ops.normquant.rms_norm_quant(*args), spec)
    data, scale, norm = torch.ops.normquant.rms_norm_quant_with_norm(*args)
    return _activation(x, data, scale, spec), norm.view(x.shape)


def add_rms_norm_quant(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
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
    if residual.shape != x.shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}; it must be x's, {tuple(x.shape)}")
    args = (rows("x", x), rows("residual", residual), weight, eps, weight_offset, spec.encode())
    if not return_norm:
        data, scale, total = torch.ops.normquant.add_rms_norm_quant(*args)
        return _activation(x, data, scale, spec), total.view(x.shape)
    data, scale, total, norm = torch.ops.normquant.add_rms_norm_quant_with_norm(*args)
    return _activation(x, data, scale, spec), total.view(x.shape), norm.view(x.shape)


def group_quant(x: torch.Tensor, *, spec: QuantSpec = DEFAULT) -> QuantizedActivation:
    """x quantized in groups of `spec.group` neighbours of a row.

    x: [..., K] bfloat16 or float16; the last stride is 1, rows may be any distance apart; K a multiple of the group.
    A group of zeros gives the scale floor and zero data; a NaN makes its group NaN; an inf gives an inf scale, NaN where
    x is inf and zero elsewhere. M = 0 gives empty outputs. Raises ValueError for anything else.
    """
    return _activation(x, *torch.ops.normquant.group_quant(rows("x", x), spec.encode()), spec)
