"""The ops as torch sees them, and the functions that a user calls.

Every op is functional, has a fixed number of outputs and takes its QuantSpec as the string `spec.encode()`, so that it
can stand in a compiled graph. On CUDA it runs a Triton kernel, on CPU the reference; the fake implementation gives the
same shapes, strides and dtypes. Ops take x as [M, K]; the functions below take any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from normquant import reference
from normquant.kernels.launch_cache import remembered
from normquant.ops._checks import check_latent, check_norm, check_quant, check_rope_last, check_silu_mul, rows
from normquant.spec import QuantizedActivation, QuantSpec, Rope

LIBRARY = torch.library.Library("normquant", "DEF")
DEFAULT = QuantSpec()
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)


Impl = Callable[..., Any]


def _register(schema: str, check: Impl, fake: Impl, cpu: Impl, cuda: Impl) -> None:
    """Define an op; each implementation sees checked inputs and, as its last argument, the decoded spec.

    cuda gives the plan of a launch, not its outputs.
    """
    LIBRARY.define(schema, tags=TAGS)
    name = schema.partition("(")[0]

    def decoded(run: Impl) -> Impl:
        def call(*args: Any) -> Any:
            args = (*args[:-1], QuantSpec.decode(args[-1]))
            check(*args)
            return run(*args)

        return call

    def launch(*args: Any) -> Any:
        from normquant.kernels.launch import Launch  # Triton is imported where something is launched

        return Launch(decoded(cuda)(*args))

    torch.library.register_fake(f"normquant::{name}", decoded(fake), lib=LIBRARY)
    LIBRARY.impl(name, decoded(cpu), "CPU")
    LIBRARY.impl(name, remembered(name, launch), "CUDA")


def _fake_quant(x: torch.Tensor, m: Any, k: Any, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
    scale = x.new_empty_strided(spec.scale_shape(m, k), spec.scale_stride(m, k), dtype=spec.scale_dtype)
    return x.new_empty((m, k), dtype=spec.dtype), scale


def _register_norm(name: str, with_residual: bool, with_norm: bool) -> None:
    residual = "Tensor residual, " if with_residual else ""
    outputs = ["Tensor data", "Tensor scale"] + ["Tensor sum"] * with_residual + ["Tensor norm"] * with_norm
    schema = (
        f"{name}(Tensor x, {residual}Tensor weight, float eps, float weight_offset, str spec) -> ({', '.join(outputs)})"
    )

    def split(args):
        return args if with_residual else (args[0], None, *args[1:])

    def check(*args):
        x, residual, weight, _, _, spec = split(args)
        check_norm(x, residual, weight, spec)

    def fake(x, *args):
        return *_fake_quant(x, x.shape[0], x.shape[1], args[-1]), *(x.new_empty(x.shape) for _ in outputs[2:])

    def cpu(*args):
        x, residual, weight, eps, offset, spec = split(args)
        if with_residual:
            return reference.add_rms_norm_quant(x, residual, weight, eps, spec, offset)[: len(outputs)]
        return reference.rms_norm_quant(x, weight, eps, spec, offset)[: len(outputs)]

    def cuda(*args):
        from normquant.kernels.rms_norm_quant import rms_norm_quant

        x, residual, weight, eps, offset, spec = split(args)
        return rms_norm_quant.plan(x, residual, weight, eps, spec, offset, with_norm)

    _register(schema, check, fake, cpu, cuda)


def _register_tensor_eps(name: str) -> None:
    """The overload `tensor` of a norm, with epsilon as a tensor: torch.compile(dynamic=True) turns the Python floats of
    a module into inputs of the graph, 0-dim float64 tensors on the CPU. Reading one there waits for no GPU."""
    op = getattr(torch.ops.normquant, name).default
    at = [argument.name for argument in op._schema.arguments].index("eps")

    def fake(*args: Any) -> Any:
        return op(*args[:at], 1.0, *args[at + 1 :])

    def run(*args: Any) -> Any:
        return op(*args[:at], float(args[at]), *args[at + 1 :])

    schema = str(op._schema).partition("(")[2].replace("float eps", "Tensor eps")
    LIBRARY.define(f"{name}.tensor({schema}", tags=TAGS)
    LIBRARY.impl(f"{name}.tensor", run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"normquant::{name}.tensor", fake, lib=LIBRARY)


for _name in ("rms_norm_quant", "add_rms_norm_quant"):
    for _with_norm in (False, True):
        _full_name = f"{_name}_with_norm" if _with_norm else _name
        _register_norm(_full_name, _name.startswith("add"), _with_norm)
        _register_tensor_eps(_full_name)


def _group_quant_cuda(x, spec):
    from normquant.kernels.group_quant import group_quant

    return group_quant.plan(x, spec)


_register(
    "group_quant(Tensor x, str spec) -> (Tensor data, Tensor scale)",
    check_quant,
    lambda x, spec: _fake_quant(x, x.shape[0], x.shape[1], spec),
    reference.group_quant,
    _group_quant_cuda,
)


def _silu_mul_quant_cuda(x, spec):
    from normquant.kernels.silu_mul_quant import silu_mul_quant

    return silu_mul_quant.plan(x, spec)


_register(
    "silu_mul_quant(Tensor x, str spec) -> (Tensor data, Tensor scale)",
    check_silu_mul,
    lambda x, spec: _fake_quant(x, x.shape[0], x.shape[1] // 2, spec),
    reference.silu_mul_quant,
    _silu_mul_quant_cuda,
)


def _register_latent(name: str, quantize_kv: bool) -> None:
    schema = (
        f"{name}(Tensor x, Tensor q_weight, Tensor kv_weight, Tensor cos, Tensor sin, Tensor? positions, float eps, "
        f"str rope, str spec) -> (Tensor q_data, Tensor q_scale, Tensor kv_norm, Tensor k_pe"
        f"{', Tensor kv_data, Tensor kv_scale' if quantize_kv else ''})"
    )

    def fake(x, q_weight, kv_weight, *args):
        m, q, c, spec = x.shape[0], q_weight.shape[0], kv_weight.shape[0], args[-1]
        kv = _fake_quant(x, m, c, spec) if quantize_kv else ()
        return *_fake_quant(x, m, q, spec), x.new_empty((m, c)), x.new_empty((m, x.shape[1] - q - c)), *kv

    def cpu(*args: Any) -> Any:
        return reference.latent_norm_quant(*args)[: 6 if quantize_kv else 4]

    def cuda(*args: Any) -> Any:
        from normquant.kernels.latent_norm_quant import latent_norm_quant

        return latent_norm_quant.plan(*args, quantize_kv)

    _register(schema, check_latent, fake, cpu, cuda)


_register_latent("latent_norm_quant", quantize_kv=False)
_register_latent("latent_norm_quant_with_kv", quantize_kv=True)


def _rope_last_cuda(*args):
    from normquant.kernels.rope_last import rope_last

    return rope_last.plan(*args)


# For the compile pass: the queries of latent attention, of which the spec says only how the products are rounded.
_register(
    "rope_last(Tensor x, Tensor cos, Tensor sin, Tensor? positions, int heads, int r, str rope, str spec) -> Tensor",
    check_rope_last,
    lambda x, *args: x.new_empty(x.shape),
    reference.rope_last,
    _rope_last_cuda,
)


def _activation(lead: torch.Size, quantized: tuple[torch.Tensor, ...], spec: QuantSpec) -> QuantizedActivation:
    data, scale = quantized
    if len(lead) == 1:  # a view would restride a single row
        return QuantizedActivation(data, scale, spec)
    return QuantizedActivation(data.view(*lead, data.shape[-1]), scale.view(*lead, scale.shape[-1]), spec)


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
        return _activation(x.shape[:-1], torch.ops.normquant.rms_norm_quant(*args), spec)
    data, scale, norm = torch.ops.normquant.rms_norm_quant_with_norm(*args)
    return _activation(x.shape[:-1], (data, scale), spec), norm.view(x.shape)


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
        return _activation(x.shape[:-1], (data, scale), spec), total.view(x.shape)
    data, scale, total, norm = torch.ops.normquant.add_rms_norm_quant_with_norm(*args)
    return _activation(x.shape[:-1], (data, scale), spec), total.view(x.shape), norm.view(x.shape)


def group_quant(x: torch.Tensor, *, spec: QuantSpec = DEFAULT) -> QuantizedActivation:
    """x quantized in groups of `spec.group` neighbours of a row.

    x: [..., K] bfloat16 or float16; the last stride is 1, rows may be any distance apart; K a multiple of the group.
    A group of zeros gives the scale floor and zero data; a NaN makes its group NaN; an inf gives an inf scale, NaN
    where x is inf and zero elsewhere. M = 0 gives empty outputs. Raises ValueError for anything else.
    """
    return _activation(x.shape[:-1], torch.ops.normquant.group_quant(rows("x", x), spec.encode()), spec)


def silu_mul_quant(x: torch.Tensor, *, spec: QuantSpec = DEFAULT) -> QuantizedActivation:
    """silu(gate) * up, quantized in groups, in one kernel.

    silu(g) = g / (1 + exp(-g)) in fp32; `spec.rounding` "twice" rounds it and the product to x's dtype, as an eager
    model does, "once" the product alone.

    x: [..., 2K] bfloat16 or float16, gate in the first K values and up in the others; the last stride is 1, rows may be
    any distance apart; K a multiple of the group. Returns [..., K]. Raises ValueError for anything else.
    """
    return _activation(x.shape[:-1], torch.ops.normquant.silu_mul_quant(rows("x", x), spec.encode()), spec)


def latent_norm_quant(
    x: torch.Tensor,
    q_weight: torch.Tensor,
    kv_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None = None,
    eps: float = 1e-6,
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
    q_weight [Q], kv_weight [C]: weights of the two RMSNorms, which share `eps`; the rest of x is k_pe.
    cos, sin: [positions, R/2] or wider, of which the first R/2 values of a row are read; rows may be any distance
        apart. vLLM: the halves of cos_sin_cache. transformers: the rows of position_embeddings, `positions` None.
    positions: [...] int32 or int64, which row of cos and sin belongs to which row of x; None: row i to row i. They are
        not looked at before they are used: on a GPU one out of range reads beyond cos and sin.
    rope: "interleaved" turns the pairs (2i, 2i+1), "half" the pairs (i, i + R/2), "interleaved_to_half" reads the first
        and writes the second, as transformers' DeepSeek does. Rounded to x's dtype once, or after each product too
        where `spec.rounding` is "inner" or "twice", as an eager model does.

    Returns q_a normed and quantized [..., Q], kv_a normed [..., C], k_pe turned [..., R], and with quantize_kv the
    normed kv_a quantized [..., C]. Q and C must be multiples of `spec.group`. Raises ValueError for anything else.
    """
    flat = None if positions is None else positions.reshape(-1)
    args = (rows("x", x), q_weight, kv_weight, cos, sin, flat, eps, rope, spec.encode())
    op = torch.ops.normquant.latent_norm_quant_with_kv if quantize_kv else torch.ops.normquant.latent_norm_quant
    q_data, q_scale, kv_norm, k_pe, *kv = op(*args)
    lead = x.shape[:-1]
    outputs = (
        _activation(lead, (q_data, q_scale), spec),
        kv_norm.view(*lead, kv_norm.shape[-1]),
        k_pe.view(*lead, k_pe.shape[-1]),
    )
    return (*outputs, _activation(lead, tuple(kv), spec)) if quantize_kv else outputs
