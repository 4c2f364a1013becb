"""RMSNorm of every head times silu of a gate, and group quantization of the row, as one op."""

from __future__ import annotations

from typing import Any

import torch

from normquant import reference
from normquant.ops._examples import EPS, HEAD_DIM, Examples
from normquant.ops._gradients import refuse_gradients
from normquant.ops._op import DEFAULT, Op, Traffic, register
from normquant.ops._tensors import (
    ACTIVATION_BYTES,
    activation,
    check_eps,
    check_like,
    check_quant,
    check_weight,
    fake_quant,
    rows,
)
from normquant.spec import QuantizedActivation, QuantSpec

HEADS = tuple(2**i for i in range(4, 11))  # values of a head: powers of two that a program can hold several of
WIDTHS = (4096, 2048, 8192)  # 32 heads of 128 of Qwen3-Next and Qwen3.5, whole and at TP2; 64 heads


def gated_norm_quant(
    x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float = EPS, *, spec: QuantSpec = DEFAULT
) -> QuantizedActivation:
    """norm(x) * silu(z), the norm of every head, quantized in groups, in one kernel.

    n = x / sqrt(mean(x**2) + eps) * weight over each head of D values, rounded as `spec.rounding` says: "twice" as
    transformers' Qwen3NextRMSNormGated with a weight like x, "none" as vLLM's RMSNormGated with norm_before_gate. Then
    n * silu(z) in fp32, rounded to x's dtype, as all of them do, and quantized as `QuantSpec` says.

    x: [..., H * D] bfloat16 or float16, heads side by side; the last stride is 1, rows may be any distance apart.
    z: like x, with rows a distance of their own apart.
    weight: [D] bfloat16, float16 or float32, contiguous, for all heads; D a power of two from 16 to 1024.
    eps: positive.

    NaN and rows that overflow are as in `rms_norm_quant`, of one head. H * D must be a multiple of the group; M = 0
    gives empty outputs. Raises ValueError for anything else.
    """
    if torch.is_grad_enabled():  # DTensor hides from the op what requires grad
        refuse_gradients("gated_norm_quant", (x, z, weight))
    args = (rows("x", x), rows("z", z), weight, eps, spec.encode())
    return activation(x.shape[:-1], torch.ops.normquant.gated_norm_quant(*args), spec)


def _check(x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float, spec: QuantSpec) -> None:
    """x and z must be [M, H * D] bf16 or fp16 with last stride 1, weight [D], D one of HEADS; eps as for a norm."""
    check_quant(x, spec)
    check_like("z", z, x)
    if weight.dim() != 1 or weight.shape[0] not in HEADS:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; it must be [D], D one of {', '.join(map(str, HEADS))}"
        )
    if x.shape[1] % weight.shape[0]:
        raise ValueError(f"x has {x.shape[1]} columns, which are not heads of {weight.shape[0]} values, as weight has")
    check_weight(weight, x, "weight")
    check_eps(eps)


def _fake(x, z, weight, eps, spec):
    return fake_quant(x, x.shape[0], x.shape[1], spec)


def _plan(x, z, weight, eps, spec, config=None):
    from normquant.kernels.gated_norm_quant import plan_gated_norm_quant

    return plan_gated_norm_quant(x, z, weight, eps, spec, config)


def _traffic(m: int, k: int, spec: QuantSpec, *, head_dim: int = HEAD_DIM) -> Traffic:
    return (2 * m * k + head_dim) * ACTIVATION_BYTES, spec.bytes(m, k)


def _example(e: Examples) -> dict[str, Any]:
    return {"x": e.rows(e.k), "z": e.rows(e.k), "weight": e.weight(e.head_dim), "eps": EPS}


def _sizes(x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float) -> dict[str, Any]:
    return {"k": x.shape[-1], "weight_dtype": weight.dtype, "head_dim": weight.shape[0]}


register(
    Op(
        name="gated_norm_quant",
        schema="(Tensor x, Tensor z, Tensor weight, float eps, str spec) -> (Tensor data, Tensor scale)",
        check=_check,
        fake=_fake,
        reference=reference.gated_norm_quant,
        plan=_plan,
        traffic=_traffic,
        example=_example,
        sizes=_sizes,
        configs="gated_norm_quant",
        widths=WIDTHS,
        eps_overload=True,
    )
)
