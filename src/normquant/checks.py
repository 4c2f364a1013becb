"""What the ops accept. Each check raises a ValueError that says what was given and what is accepted."""

from __future__ import annotations

import torch

from normquant.spec import ACTIVATION_DTYPES, QuantSpec

WEIGHT_DTYPES = (*ACTIVATION_DTYPES, torch.float32)


def rows(name: str, x: torch.Tensor) -> torch.Tensor:
    """x [..., K] as [M, K] without a copy."""
    if x.dim() == 0:
        raise ValueError(f"{name} is 0-dimensional; [..., K] is accepted")
    if x.dim() == 2:
        return x
    try:
        return x.view(-1, x.shape[-1]) if x.numel() else x.new_empty((0, x.shape[-1]))
    except RuntimeError:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)} and stride {x.stride()}, whose leading dimensions are not evenly spaced "
            f"rows; call .contiguous() on it"
        ) from None


def check_quant(x: torch.Tensor, spec: QuantSpec, name: str = "x") -> None:
    """x must be [M, K] bf16 or fp16 with last stride 1 and K a positive multiple of spec.group."""
    if x.dim() != 2:
        raise ValueError(f"{name} has {x.dim()} dimensions; the op takes [M, K]")
    if x.dtype not in ACTIVATION_DTYPES:
        raise ValueError(f"{name} has dtype {x.dtype}; accepted: {_names(ACTIVATION_DTYPES)}")
    k = x.shape[1]
    if k == 0 or k % spec.group:
        raise ValueError(f"{name} has K = {k}; K must be a positive multiple of the group, {spec.group}")
    if x.stride(1) != 1:
        raise ValueError(f"{name} has stride {x.stride()}; the last stride must be 1")


def check_norm(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, spec: QuantSpec) -> None:
    """As `check_quant`; residual must be like x, weight [K] on x's device, contiguous, bf16, fp16 or fp32."""
    check_quant(x, spec)
    if residual is not None:
        if residual.shape != x.shape or residual.dtype != x.dtype:
            raise ValueError(
                f"residual is {_describe(residual)}; it must have x's shape and dtype, {_describe(x)}"
            )
        check_quant(residual, spec, "residual")
        _same_device("residual", residual, x)
    if weight.dim() != 1 or weight.shape[0] != x.shape[1]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be [K] = [{x.shape[1]}]")
    if weight.dtype not in WEIGHT_DTYPES:
        raise ValueError(f"weight has dtype {weight.dtype}; accepted: {_names(WEIGHT_DTYPES)}")
    if weight.stride(0) != 1:
        raise ValueError(f"weight has stride {weight.stride()}; it must be contiguous")
    _same_device("weight", weight, x)


def _same_device(name: str, t: torch.Tensor, x: torch.Tensor) -> None:
    if t.device != x.device:
        raise ValueError(f"{name} is on {t.device} and x on {x.device}; both must be on one device")


def _describe(t: torch.Tensor) -> str:
    return f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}"


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)
