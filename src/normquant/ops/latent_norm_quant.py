"""The latents of multi-head latent attention as one op: two norms, one or both quantized, and a rotary embedding."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch

from normquant import reference
from normquant.ops._examples import EPS, LATENT, Examples
from normquant.ops._gradients import refuse_gradients
from normquant.ops._op import DEFAULT, Op, Traffic, register
from normquant.ops._tensors import (
    ACTIVATION_BYTES,
    activation,
    check_angles,
    check_eps,
    check_normed_width,
    check_rows,
    check_weight,
    fake_quant,
    rows,
    shapes,
)
from normquant.spec import QuantizedActivation, QuantSpec, Rope

WIDTHS = (1536,)  # q_a of DeepSeek-R1


@overload
def latent_norm_quant(
    x: torch.Tensor,
    q_weight: torch.Tensor,
    kv_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None = None,
    eps: float = ...,
    *,
    rope: Rope = ...,
    spec: QuantSpec = ...,
    quantize_kv: Literal[False] = ...,
) -> tuple[QuantizedActivation, torch.Tensor, torch.Tensor]: ...


@overload
def latent_norm_quant(
    x: torch.Tensor,
    q_weight: torch.Tensor,
    kv_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None = None,
    eps: float = ...,
    *,
    rope: Rope = ...,
    spec: QuantSpec = ...,
    quantize_kv: Literal[True],
) -> tuple[QuantizedActivation, torch.Tensor, torch.Tensor, QuantizedActivation]: ...


def latent_norm_quant(
    x: torch.Tensor,
    q_weight: torch.Tensor,
    kv_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None = None,
    eps: float = EPS,
    *,
    rope: Rope = "interleaved",
    spec: QuantSpec = DEFAULT,
    quantize_kv: bool = False,
) -> (
    tuple[QuantizedActivation, torch.Tensor, torch.Tensor]
    | tuple[QuantizedActivation, torch.Tensor, torch.Tensor, QuantizedActivation]
):
    """The latents of multi-head latent attention from the fused qkv_a projection, in one kernel.

    x: [..., Q + C + R] bfloat16 or float16: q_a, kv_a and k_pe; rows may be any distance apart.
    q_weight [Q], kv_weight [C]: weights of the two RMSNorms, which share `eps`, a positive number; the rest is k_pe.
    cos, sin: [positions, R/2] or wider, of which the first R/2 values of a row are read; rows may be any distance
        apart. vLLM: the halves of cos_sin_cache. transformers: the rows of position_embeddings, `positions` None.
    positions: [...] int32 or int64, which row of cos and sin belongs to which row of x; None: row i to row i. They are
        not looked at before they are used: on a GPU one out of range reads beyond cos and sin.
    rope: "interleaved" rotates the pairs (2i, 2i+1), "half" the pairs (i, i + R/2), "interleaved_to_half" reads the
        first and writes the second, as transformers' DeepSeek does. Rounded to x's dtype once, or after each product
        too where `spec.rounding` is "inner" or "twice", as an eager model does.

    Returns q_a normed and quantized [..., Q], kv_a normed [..., C], k_pe rotated [..., R], and with quantize_kv the
    normed kv_a quantized [..., C]. Q and C must be multiples of `spec.group`. Raises ValueError for anything else.
    """
    if torch.is_grad_enabled():  # DTensor hides from the op what requires grad
        refuse_gradients("latent_norm_quant", (x, q_weight, kv_weight, cos, sin))
    flat = None if positions is None else positions.reshape(-1)
    args = (rows("x", x), q_weight, kv_weight, cos, sin, flat, eps, rope, spec.encode())
    op = torch.ops.normquant.latent_norm_quant_with_kv if quantize_kv else torch.ops.normquant.latent_norm_quant
    q_data, q_scale, kv_norm, k_pe, *kv = op(*args)
    lead = x.shape[:-1]
    outputs = (
        activation(lead, (q_data, q_scale), spec),
        kv_norm.view(*lead, kv_norm.shape[-1]),
        k_pe.view(*lead, k_pe.shape[-1]),
    )
    return (*outputs, activation(lead, tuple(kv), spec)) if quantize_kv else outputs


def _check(
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
            f"x, q_weight and kv_weight have shapes {shapes(x, q_weight, kv_weight)}; accepted: [M, Q+C+R], [Q], [C]"
        )
    q, c = q_weight.shape[0], kv_weight.shape[0]
    r = x.shape[1] - q - c
    if r <= 0 or r % 2:
        raise ValueError(f"x has {x.shape[1]} columns and the weights {q} + {c}; an even number must remain for k_pe")
    check_rows(x, "x")
    check_normed_width(q, spec, "q_a")
    check_normed_width(c, spec, "kv_a")
    check_weight(q_weight, x, "q_weight")
    check_weight(kv_weight, x, "kv_weight")
    check_angles(x, cos, sin, positions, r, rope)
    check_eps(eps)


def _example(e: Examples) -> dict[str, Any]:
    c, r = e.latent
    cos, sin = e.angles(r)
    return {
        "x": e.rows(e.k + c + r),
        "q_weight": e.weight(e.k),
        "kv_weight": e.weight(c),
        "cos": cos,
        "sin": sin,
        "positions": e.positions(),
        "eps": EPS,
        "rope": e.rope,
    }


def _sizes(x, q_weight, kv_weight, *args):
    q, c = len(q_weight), len(kv_weight)
    return {"k": q, "latent": (c, x.shape[-1] - q - c), "weight_dtype": q_weight.dtype, "rope": args[-1]}


def _register(name: str, quantize_kv: bool) -> None:
    schema = (
        f"(Tensor x, Tensor q_weight, Tensor kv_weight, Tensor cos, Tensor sin, Tensor? positions, float eps, "
        f"str rope, str spec) -> (Tensor q_data, Tensor q_scale, Tensor kv_norm, Tensor k_pe"
        f"{', Tensor kv_data, Tensor kv_scale' if quantize_kv else ''})"
    )

    def fake(x, q_weight, kv_weight, *args):
        m, q, c, spec = x.shape[0], q_weight.shape[0], kv_weight.shape[0], args[-1]
        kv = fake_quant(x, m, c, spec) if quantize_kv else ()
        return *fake_quant(x, m, q, spec), x.new_empty((m, c)), x.new_empty((m, x.shape[1] - q - c)), *kv

    def of_reference(*args):
        return reference.latent_norm_quant(*args)[: 6 if quantize_kv else 4]

    def plan(x, q_weight, kv_weight, cos, sin, positions, eps, rope, spec, config=None):
        from normquant.kernels.latent_norm_quant import plan_latent_norm_quant

        inputs = x, q_weight, kv_weight, cos, sin, positions
        return plan_latent_norm_quant(*inputs, eps, rope, spec, quantize_kv, config)

    def traffic(m: int, k: int, spec: QuantSpec, *, latent: tuple[int, int] = LATENT) -> Traffic:
        (c, r), kv = latent, spec.bytes(m, latent[0]) if quantize_kv else 0
        read = (m * (k + c + r) + k + c + m * r) * ACTIVATION_BYTES  # of cos and sin a row for each of x
        return read, spec.bytes(m, k) + m * (c + r) * ACTIVATION_BYTES + kv

    register(
        Op(
            name=name,
            schema=schema,
            check=_check,
            fake=fake,
            reference=of_reference,
            plan=plan,
            traffic=traffic,
            example=_example,
            sizes=_sizes,
            configs="latent_norm_quant",
            stem="latent_norm_quant",
            choices=("late_weight", "evict_first", "tiles"),
            widths=WIDTHS,
        )
    )


_register("latent_norm_quant", quantize_kv=False)
_register("latent_norm_quant_with_kv", quantize_kv=True)
