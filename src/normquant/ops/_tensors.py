"""Tensors that the ops accept and return.

A check raises a ValueError that says what was given and what is accepted.
"""

from __future__ import annotations

from typing import Any, get_args

import torch

from normquant.kernels.tiling import MAX_ROW
from normquant.spec import ACTIVATION_DTYPES, QuantizedActivation, QuantSpec, Rope, one_of

ACTIVATION_BYTES = 2
FP32 = torch.finfo(torch.float32)
WEIGHT_DTYPES = (*ACTIVATION_DTYPES, torch.float32)


def rows(name: str, x: torch.Tensor) -> torch.Tensor:
    """x [..., K] as [M, K] without a copy."""
    if x.dim() == 0:
        raise ValueError(f"{name} is 0-dimensional; [..., K] is accepted")
    if x.dim() == 2:
        return x
    try:
        return x.view(-1, x.shape[-1]) if x.numel() else x.new_empty((0, x.shape[-1]))
    except (RuntimeError, ValueError):  # eager and fake tensors
        raise ValueError(
            f"{name} has shape {tuple(x.shape)} and stride {x.stride()}, whose leading dimensions are not evenly "
            f"spaced rows; call .contiguous() on it"
        ) from None


def shaped(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """y [M, N] with the leading dimensions of x [..., K]: itself where x is a matrix, as a view takes the host longer
    than many a kernel."""
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def check_quant(x: torch.Tensor, spec: QuantSpec) -> None:
    """x must be [M, K] bf16 or fp16 with last stride 1 and K a positive multiple of spec.group."""
    check_rows(x, "x")
    check_width(x.shape[1], spec, "x")


def check_rows(x: torch.Tensor, name: str) -> None:
    """x must be [M, K] bf16 or fp16 with last stride 1."""
    if x.dim() != 2:
        raise ValueError(f"{name} has {x.dim()} dimensions; the op takes [M, K]")
    if x.dtype not in ACTIVATION_DTYPES:
        raise ValueError(f"{name} has dtype {x.dtype}; accepted: {names(ACTIVATION_DTYPES)}")
    if x.stride(1) != 1:
        raise ValueError(f"{name} has stride {x.stride()}; the last stride must be 1")


def check_width(k: int, spec: QuantSpec, name: str) -> None:
    """k must be a positive multiple of spec.group."""
    if k == 0 or k % spec.group:
        raise ValueError(f"{name} has K = {k}; K must be a positive multiple of the group, {spec.group}")


def check_normed_width(k: int, spec: QuantSpec, name: str) -> None:
    """As `check_width`, and a row must fit into one program's registers."""
    check_width(k, spec, name)
    if k > MAX_ROW:
        what = "K" if name == "x" else f"K of {name}"
        raise ValueError(f"{what} is {k}; the norm kernels hold a row in registers and take at most {MAX_ROW}")


def check_norm(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, spec: QuantSpec) -> None:
    """As `check_quant`, K at most 65536; residual must be like x, weight [K] on x's device, contiguous, bf16, fp16 or
    fp32."""
    check_rows(x, "x")
    check_normed_width(x.shape[1], spec, "x")
    if residual is not None:
        check_like("residual", residual, x)
    if weight.dim() != 1 or weight.shape[0] != x.shape[1]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be [K] = [{x.shape[1]}]")
    check_weight(weight, x, "weight")


def check_like(name: str, t: torch.Tensor, x: torch.Tensor) -> None:
    """t must have the shape, dtype and device of x [M, K], and last stride 1."""
    if t.shape != x.shape or t.dtype != x.dtype:
        raise ValueError(f"{name} is {describe(t)}; it must have x's shape and dtype, {describe(x)}")
    check_rows(t, name)
    _same_device(name, t, x)


def check_eps(eps: float) -> None:
    """eps must be a positive normal fp32: with less a row of zeros would be NaN. Symbols of a compile are let pass."""
    if isinstance(eps, int | float) and not FP32.tiny <= eps <= FP32.max:
        raise ValueError(f"eps is {eps}; it must be a positive normal fp32, from {FP32.tiny} to {FP32.max}")


def check_weight_offset(weight_offset: float) -> None:
    """weight_offset must be finite in fp32. Symbols of a compile are let pass."""
    if isinstance(weight_offset, int | float) and not abs(weight_offset) <= FP32.max:
        raise ValueError(f"weight_offset is {weight_offset}; it must be finite in fp32")


def check_limit(limit: float | None, dtype: torch.dtype) -> None:
    """limit must be None, or positive, normal and finite in `dtype`. Symbols of a compile are let pass."""
    known = torch.finfo(dtype)
    if isinstance(limit, int | float) and not known.tiny <= limit <= known.max:
        raise ValueError(
            f"limit is {limit}; it must be a positive normal {names((dtype,))}, from {known.tiny} to {known.max}"
        )


def check_weight(weight: torch.Tensor, x: torch.Tensor, name: str) -> None:
    """weight [K] must be on x's device, contiguous, bf16, fp16 or fp32."""
    if weight.dtype not in WEIGHT_DTYPES:
        raise ValueError(f"{name} has dtype {weight.dtype}; accepted: {names(WEIGHT_DTYPES)}")
    if weight.stride(0) != 1:
        raise ValueError(f"{name} has stride {weight.stride()}; it must be contiguous")
    _same_device(name, weight, x)


def check_angles(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor | None, r: int, rope: str
) -> None:
    """cos and sin must be [positions, R/2 or more], rope a known one, positions None or [M] int32 or int64."""
    one_of("rope", rope, get_args(Rope))
    for name, t in (("cos", cos), ("sin", sin)):
        if t.dim() != 2 or t.shape[1] < r // 2 or t.stride(1) != 1 or not t.dtype.is_floating_point:
            raise ValueError(
                f"{name} is {describe(t)}; accepted: [positions, {r // 2} or more], floating point, last stride 1"
            )
        _same_device(name, t, x)
    if positions is None:
        if cos.shape[0] < x.shape[0] or sin.shape[0] < x.shape[0]:
            raise ValueError(
                f"cos and sin have {cos.shape[0]} and {sin.shape[0]} rows for {x.shape[0]} rows of x without positions"
            )
    elif (
        positions.shape != x.shape[:1] or positions.dtype not in (torch.int32, torch.int64) or positions.stride(0) != 1
    ):
        raise ValueError(f"positions is {describe(positions)}; accepted: [{x.shape[0]}] int32 or int64, contiguous")
    else:
        _same_device("positions", positions, x)


def _same_device(name: str, t: torch.Tensor, x: torch.Tensor) -> None:
    if t.device != x.device:
        raise ValueError(f"{name} is on {t.device} and x on {x.device}; both must be on one device")


def describe(t: torch.Tensor) -> str:
    """Shape and dtype."""
    return f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}"


def shapes(*tensors: torch.Tensor) -> str:
    """The shapes, with commas."""
    return ", ".join(str(tuple(t.shape)) for t in tensors)


def names(dtypes: tuple[torch.dtype, ...]) -> str:
    """The dtypes, with commas."""
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def fake_quant(x: torch.Tensor, m: Any, k: Any, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialized data and scale of an [m, k] activation, on x's device; m and k may be symbolic."""
    scale = x.new_empty_strided(spec.scale_shape(m, k), spec.scale_stride(m, k), dtype=spec.scale_dtype)
    return x.new_empty((m, k), dtype=spec.dtype), scale


def activation(lead: torch.Size, quantized: tuple[torch.Tensor, ...], spec: QuantSpec) -> QuantizedActivation:
    """Data and scale with their leading dimensions back."""
    data, scale = quantized
    if len(lead) == 1:  # a view would restride a single row
        return QuantizedActivation(data, scale, spec)
    return QuantizedActivation(data.view(*lead, data.shape[-1]), scale.view(*lead, scale.shape[-1]), spec)
