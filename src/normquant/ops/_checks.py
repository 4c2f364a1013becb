"""What the ops accept. Each check raises a ValueError that says what was given and what is accepted."""

from __future__ import annotations

from typing import get_args

import torch

from normquant.spec import ACTIVATION_DTYPES, QuantSpec, Rope, one_of

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


def check_quant(x: torch.Tensor, spec: QuantSpec) -> None:
    """x must be [M, K] bf16 or fp16 with last stride 1 and K a positive multiple of spec.group."""
    _check_rows(x, "x")
    _check_width(x.shape[1], spec, "x")


def _check_rows(x: torch.Tensor, name: str) -> None:
    if x.dim() != 2:
        raise ValueError(f"{name} has {x.dim()} dimensions; the op takes [M, K]")
    if x.dtype not in ACTIVATION_DTYPES:
        raise ValueError(f"{name} has dtype {x.dtype}; accepted: {_names(ACTIVATION_DTYPES)}")
    if x.stride(1) != 1:
        raise ValueError(f"{name} has stride {x.stride()}; the last stride must be 1")


def _check_width(k: int, spec: QuantSpec, name: str) -> None:
    if k == 0 or k % spec.group:
        raise ValueError(f"{name} has K = {k}; K must be a positive multiple of the group, {spec.group}")


def check_norm(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, spec: QuantSpec) -> None:
    """As `check_quant`; residual must be like x, weight [K] on x's device, contiguous, bf16, fp16 or fp32."""
    check_quant(x, spec)
    if residual is not None:
        if residual.shape != x.shape or residual.dtype != x.dtype:
            raise ValueError(f"residual is {_describe(residual)}; it must have x's shape and dtype, {_describe(x)}")
        _check_rows(residual, "residual")
        _same_device("residual", residual, x)
    if weight.dim() != 1 or weight.shape[0] != x.shape[1]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be [K] = [{x.shape[1]}]")
    _check_weight(weight, x, "weight")


def _check_weight(weight: torch.Tensor, x: torch.Tensor, name: str) -> None:
    if weight.dtype not in WEIGHT_DTYPES:
        raise ValueError(f"{name} has dtype {weight.dtype}; accepted: {_names(WEIGHT_DTYPES)}")
    if weight.stride(0) != 1:
        raise ValueError(f"{name} has stride {weight.stride()}; it must be contiguous")
    _same_device(name, weight, x)


def check_silu_mul(x: torch.Tensor, spec: QuantSpec) -> None:
    """x must be [M, 2K] bf16 or fp16 with last stride 1 and K a positive multiple of spec.group."""
    check_quant(x, spec)
    if x.shape[1] % (2 * spec.group):
        raise ValueError(
            f"x has {x.shape[1]} columns; gate and up must each have a multiple of the group, {spec.group}"
        )


def check_latent(
    x: torch.Tensor,
    q_weight: torch.Tensor,
    kv_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    eps: float,
    rope: str,
    spec: QuantSpec,
) -> None:
    """x must be [M, Q + C + R], Q and C multiples of spec.group, R even; cos and sin [positions, R/2 or more]."""
    if x.dim() != 2 or q_weight.dim() != 1 or kv_weight.dim() != 1:
        raise ValueError(
            f"x, q_weight and kv_weight have shapes {_shapes(x, q_weight, kv_weight)}; accepted: [M, Q+C+R], [Q], [C]"
        )
    q, c = q_weight.shape[0], kv_weight.shape[0]
    r = x.shape[1] - q - c
    if r <= 0 or r % 2:
        raise ValueError(f"x has {x.shape[1]} columns and the weights {q} + {c}; an even number must remain for k_pe")
    _check_rows(x, "x")
    _check_width(q, spec, "q_a")
    _check_width(c, spec, "kv_a")
    _check_weight(q_weight, x, "q_weight")
    _check_weight(kv_weight, x, "kv_weight")
    _check_angles(x, cos, sin, positions, r, rope)


def check_rope_last(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    heads: int,
    r: int,
    rope: str,
    spec: QuantSpec,
) -> None:
    """x must be [M, heads * D] bf16 or fp16 with last stride 1, r even and at most D; the rest as `check_latent`."""
    if x.dim() != 2 or x.dtype not in ACTIVATION_DTYPES or x.stride(1) != 1:
        raise ValueError(
            f"x is {_describe(x)} with stride {x.stride()}; accepted: [M, H * D], {_names(ACTIVATION_DTYPES)}, last "
            f"stride 1"
        )
    if heads <= 0 or x.shape[1] == 0 or x.shape[1] % heads:
        raise ValueError(f"x has {x.shape[1]} columns, which are not {heads} heads of one width")
    if r <= 0 or r % 2 or r > x.shape[1] // heads:
        raise ValueError(f"r is {r}; accepted: an even number of the {x.shape[1] // heads} values of a head")
    _check_angles(x, cos, sin, positions, r, rope)


def _check_angles(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor | None, r: int, rope: str
) -> None:
    one_of("rope", rope, get_args(Rope))
    for name, t in (("cos", cos), ("sin", sin)):
        if t.dim() != 2 or t.shape[1] < r // 2 or t.stride(1) != 1 or not t.dtype.is_floating_point:
            raise ValueError(
                f"{name} is {_describe(t)}; accepted: [positions, {r // 2} or more], floating point, last stride 1"
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
        raise ValueError(f"positions is {_describe(positions)}; accepted: [{x.shape[0]}] int32 or int64, contiguous")
    else:
        _same_device("positions", positions, x)


def _same_device(name: str, t: torch.Tensor, x: torch.Tensor) -> None:
    if t.device != x.device:
        raise ValueError(f"{name} is on {t.device} and x on {x.device}; both must be on one device")


def _describe(t: torch.Tensor) -> str:
    return f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}"


def _shapes(*tensors: torch.Tensor) -> str:
    return ", ".join(str(tuple(t.shape)) for t in tensors)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)
