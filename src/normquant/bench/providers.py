"""Who does the work: this package, and the public packages that do the same, each through its public interface."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F

from normquant import specs
from normquant.bench.cases import ADD_NORM, GATED_NORM, LATENTS, NORM, QUANT, SILU, SPEC, Case, CaseInputs
from normquant.bench.timing import Call
from normquant.ops import OPS
from normquant.spec import QuantSpec, empty_scale

Quantized = tuple[torch.Tensor, torch.Tensor]
NormOutputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]  # data, scale, norm, sum
Run = Callable[[CaseInputs], Quantized]
EPS = 1e-6
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Provider:
    """A name, the arithmetic that it claims, what it lacks here, and `build(case)`, which gives its function.

    `build` returns None for a case that the provider does not do. Its function takes a set of inputs and returns data
    [M, K] and scale [M, K/group]; it may overwrite the residual. `spec` is the rule that its output is held against,
    None where the compiler is free to round as it likes. `lacks` says what keeps it from running here, None if nothing.
    """

    name: str
    build: Callable[[Case], Run | None]
    spec: Callable[[Case], QuantSpec] | None
    lacks: Callable[[], str | None] = lambda: None


def packages(*names: str) -> Callable[[], str | None]:
    """What a provider lacks that needs these packages."""

    def lacks() -> str | None:
        missing = [name for name in names if find_spec(name) is None]
        return f"{', '.join(missing)} not installed" if missing else None

    return lacks


def calls(run: Run, sets: Sequence[CaseInputs]) -> Sequence[Call]:
    """One call for each set of inputs."""
    return [partial(run, i) for i in sets]


def normquant(case: Case) -> Run:
    """This package's ops, as a compiled graph calls them."""
    op, spec = case.definition.overload, case.spec.encode()
    return lambda i: op(*i.values(), spec)[:2]


def q_a_alone(case: Case) -> Run | None:
    """The q_a part of the latent op alone: what the other two latents add is measured against it."""
    if case.op != LATENTS:
        return None
    op, spec = OPS[NORM].overload, case.spec.encode()
    return lambda i: op(i["x"][:, : case.k], i["q_weight"], EPS, 0.0, spec)


def eager(case: Case) -> Run | None:
    """The graph that a model writes, run by eager torch, one kernel an op."""
    runs: dict[str, Run] = {
        NORM: lambda i: _norm_quant(i["x"], None, i["weight"], case.normed)[:2],
        ADD_NORM: lambda i: _norm_quant(i["x"], i["residual"], i["weight"], case.normed)[:2],
        QUANT: lambda i: _aten_quant(i["x"]),
        SILU: lambda i: _aten_quant(F.silu(i["x"][:, : case.k]) * i["x"][:, case.k :]),
        GATED_NORM: lambda i: _aten_quant(gated_norm(i["x"], i["z"], i["weight"])),
    }
    return runs.get(case.op)


def any_rows(tensors: Iterable[torch.Tensor | None], dim: int = 0) -> None:
    """Make the next compile accept any number of rows above one along `dim`; a single row has its own compile."""
    for t in tensors:
        if t is not None and t.shape[dim] > 1:
            torch._dynamo.mark_dynamic(t, dim)


@contextmanager
def no_recompile_limit() -> Iterator[None]:
    """Every layer, width and M has its own compile; beyond Dynamo's limit of eight it would silently run eager."""
    with torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=4096):
        yield


def compiled(nested: bool) -> Callable[[Case], Run | None]:
    """The same graph through torch.compile, compiled for each K and once for every M above one.

    nested: with Inductor's nested reductions, which make one kernel of the norm and the groups' maxima.
    """

    def build(case: Case) -> Run | None:
        """The same graph through torch.compile, compiled for each K and once for every M above one."""
        if case.op not in (NORM, ADD_NORM):
            return None

        def call(i: CaseInputs) -> Quantized:
            x, residual = i["x"], i.get("residual")
            any_rows((x, residual))
            for t in (x, residual):
                if t is not None:
                    torch._dynamo.mark_static(t, 1)  # else a second K would make K symbolic
            with no_recompile_limit():
                return _compiled(nested)(x, residual, i["weight"], case.normed)[:2]

        return call

    return build


@cache
def _compiled(nested: bool) -> Callable[..., NormOutputs]:
    options: dict[str, Any] | None = {"triton.nested_reduction": True} if nested else None
    return torch.compile(_norm_quant, fullgraph=True, options=options)


def no_nested_reductions() -> str | None:
    """What the provider with nested reductions lacks."""
    from torch._inductor import config

    return None if hasattr(config.triton, "nested_reduction") else f"no nested reductions in torch {torch.__version__}"


def norm(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """transformers' RMSNorm, in torch's own ops."""
    f = h.float()
    return weight * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + EPS)).to(h.dtype)


def gated_norm(x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """transformers' gated norm of Qwen3-Next, of heads side by side: x, z [M, H * D], weight [D] -> [M, H * D]."""
    n = norm(x.unflatten(1, (-1, weight.shape[0])), weight).flatten(1)
    return (n * F.silu(z.float())).to(x.dtype)


def _aten_quant(y: torch.Tensor) -> Quantized:
    grouped = y.float().unflatten(-1, (-1, 128))
    scale = grouped.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0
    return (grouped / scale).clamp(-448.0, 448.0).to(FP8).flatten(-2), scale.squeeze(-1)


def _norm_quant(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, normed: bool) -> NormOutputs:
    h = x if residual is None else x + residual
    y = norm(h, weight)
    return *_aten_quant(y), (y if normed else None), (None if residual is None else h)


def vllm_fused(case: Case) -> Run | None:
    """vLLM's `rms_norm_per_block_quant` and `silu_and_mul_per_block_quant`, column-major scales."""
    from vllm import _custom_ops as vllm_ops

    def norm(i: CaseInputs) -> Quantized:
        columns = {"is_scale_transposed": True, "tma_alignment": 4}
        return vllm_ops.rms_norm_per_block_quant(
            i["x"], i["weight"], EPS, FP8, [1, 128], residual=i.get("residual"), **columns
        )

    def silu(i: CaseInputs) -> Quantized:
        return vllm_ops.silu_and_mul_per_block_quant(i["x"], 128, FP8, is_scale_transposed=True)

    return None if case.normed else {NORM: norm, ADD_NORM: norm, SILU: silu}.get(case.op)


def vllm_unfused(case: Case) -> Run | None:
    """vLLM's norm or silu kernel followed by its `per_token_group_quant_fp8`, column-major TMA-aligned scales."""
    from vllm import _custom_ops as vllm_ops
    from vllm.model_executor.layers.quantization.utils.fp8_utils import per_token_group_quant_fp8

    def quant(y: torch.Tensor) -> Quantized:
        return per_token_group_quant_fp8(y, 128, column_major_scales=True, tma_aligned_scales=True, use_ue8m0=False)

    def norm(i: CaseInputs) -> Quantized:
        y = torch.empty_like(i["x"])
        vllm_ops.rms_norm(y, i["x"], i["weight"], EPS)
        return quant(y)

    def add_norm(i: CaseInputs) -> Quantized:
        vllm_ops.fused_add_rms_norm(i["x"], i.get("residual"), i["weight"], EPS)  # overwrites x with the norm
        return quant(i["x"])

    def silu(i: CaseInputs) -> Quantized:
        y = torch.empty(case.m, case.k, dtype=i["x"].dtype, device=i["x"].device)
        torch.ops._C.silu_and_mul(y, i["x"])
        return quant(y)

    return {NORM: norm, ADD_NORM: add_norm, SILU: silu, QUANT: lambda i: quant(i["x"])}.get(case.op)


def helion(case: Case) -> Run | None:
    """vLLM's kernels in Helion, with the configs that it brings, which are of widths 2048, 4096 and 5120."""

    def outputs(i: CaseInputs) -> Quantized:
        data = torch.empty(case.m, case.k, dtype=FP8, device=i["x"].device)
        return data, empty_scale(case.m, case.k, SPEC, i["x"].device)

    def norm(i: CaseInputs) -> Quantized:
        data, scale = outputs(i)
        kernel(data, i["x"], i["weight"], scale, EPS, None, i.get("residual"), 128, True)
        return data, scale

    def silu(i: CaseInputs) -> Quantized:
        data, scale = outputs(i)
        kernel(data, i["x"], scale, 128, None, True)
        return data, scale

    def quant(i: CaseInputs) -> Quantized:
        data, scale = outputs(i)
        kernel(i["x"], data, scale, 128, 1e-10, -448.0, 448.0, False, True, True)
        return data, scale

    kernels: dict[str, tuple[str, Run]] = {
        SILU: ("silu_and_mul_per_block_quant", silu),
        QUANT: ("per_token_group_fp8_quant", quant),
        **dict.fromkeys((NORM, ADD_NORM), ("rms_norm_per_block_quant", norm)),
    }
    if case.normed or case.op not in kernels:
        return None
    name, run = kernels[case.op]
    kernel = getattr(import_module(f"vllm.kernels.helion.ops.{name}"), name)
    return run


def flashinfer(pdl: bool) -> Callable[[Case], Run | None]:
    """FlashInfer's `fused_add_rmsnorm_fp8_block_quant`, which always adds a residual and always writes the norm."""

    def build(case: Case) -> Run | None:
        """FlashInfer's `fused_add_rmsnorm_fp8_block_quant`, with a residual and the norm written."""
        from flashinfer.norm import fused_add_rmsnorm_fp8_block_quant

        if case.op != ADD_NORM or not case.normed or case.k % 256:
            return None

        def run(i: CaseInputs) -> Quantized:
            data = torch.empty_like(i["x"], dtype=FP8)
            norm = torch.empty_like(i["x"])
            scale = torch.empty(case.k // 128, (case.m + 3) // 4 * 4, device=i["x"].device)
            fused_add_rmsnorm_fp8_block_quant(data, scale, norm, i["x"], i.get("residual"), i["weight"], EPS, pdl)
            return data, scale.t()[: case.m]

        return run

    return build


def _vllm_fused_spec(case: Case) -> QuantSpec:
    return specs.VLLM_FUSED_SILU if case.op == SILU else specs.VLLM_FUSED


def _vllm_unfused_spec(case: Case) -> QuantSpec:
    return specs.VLLM if case.op == SILU else specs.VLLM_OPS


def _helion_spec(case: Case) -> QuantSpec:
    """The scale is a product with 1/448, also on a CPU."""
    return specs.VLLM if case.op == QUANT else _vllm_fused_spec(case).replace(scale_by="multiply")


PROVIDERS = {
    p.name: p
    for p in (
        Provider("normquant", normquant, lambda case: case.spec),
        Provider("normquant q_a alone", q_a_alone, lambda case: case.spec),
        Provider("torch eager", eager, lambda case: specs.HF),
        Provider("torch.compile", compiled(nested=False), None),
        Provider("torch.compile nested", compiled(nested=True), None, no_nested_reductions),
        Provider("vllm fused", vllm_fused, _vllm_fused_spec, packages("vllm")),
        Provider("vllm unfused", vllm_unfused, _vllm_unfused_spec, packages("vllm")),
        Provider("vllm helion", helion, _helion_spec, packages("vllm", "helion")),
        Provider("flashinfer", flashinfer(False), lambda case: specs.FLASHINFER, packages("flashinfer")),
        Provider("flashinfer pdl", flashinfer(True), lambda case: specs.FLASHINFER, packages("flashinfer")),
    )
}
