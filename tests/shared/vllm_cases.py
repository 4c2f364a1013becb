"""vLLM's own cases for its fused norm and quantization kernels, with our ops in the place of theirs, on any device.

Sizes, inputs and tolerances are those of `tests/kernels/core/test_fused_quant_layernorm.py` and
`test_rms_norm_group_quant.py`; forms are those that its linear kernels ask for. Left out is what our ops do not have:
int8, fp32 activations, one scale for a row or a tensor, scales that are bounded or given in advance.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from shared.compare import pad_rows

import normquant as nq
from normquant.spec import QuantizedActivation, QuantSpec
from normquant.specs import VLLM, VLLM_UE8M0

EPS = 1e-6
LAYERNORM = ((1, 64), (1, 128), (1, 1024), (1, 5120), (2048, 64), (2048, 1024), (4096, 64))
GROUP_QUANT = tuple(product((1, 7, 256), (128, 512, 1024, 5120)))
FORMS = {
    "row": VLLM,
    "column": VLLM.replace(layout="col"),
    "aligned": VLLM.replace(layout="col_tma"),
    "ue8m0 row": VLLM_UE8M0,
    "ue8m0 aligned": VLLM_UE8M0.replace(layout="col_tma"),
    "packed": VLLM_UE8M0.replace(scale="ue8m0_packed", layout="col_tma"),
}


@dataclass(frozen=True)
class Case:
    """small: inputs of 1/hidden, where epsilon counts; else standard normal. strided: x is part of a wider tensor."""

    tokens: int
    hidden: int
    small: bool
    spec: QuantSpec
    residual: bool
    strided: bool


def cases() -> list[Case]:
    """Every size with every form and group; with and without residual and strides in turn."""
    sizes = [(True, size) for size in LAYERNORM] + [(False, size) for size in GROUP_QUANT]
    chosen = [
        (m, k, small, form.replace(group=group))
        for (small, (m, k)), form, group in product(sizes, FORMS.values(), (64, 128))
        if k % group == 0
    ]
    return [Case(*size_and_spec, i // 2 % 2 == 0, i % 3 == 0) for i, size_and_spec in enumerate(chosen)]


def some_cases() -> list[Case]:
    """About every sixth of them: what takes time on a GPU is compiling."""
    return cases()[::7]


def inputs(case: Case, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, residual and weight, all bf16; only x is strided."""
    generator = torch.Generator().manual_seed(0)
    magnitude = 1 / case.hidden if case.small else 1.0
    shape = (case.tokens, 2 * case.hidden if case.strided else case.hidden)
    x = (torch.randn(shape, generator=generator) * magnitude).bfloat16().to(device)[:, : case.hidden]
    residual = (torch.randn(case.tokens, case.hidden, generator=generator) * magnitude).bfloat16().to(device)
    weight = (1 + 0.1 * torch.randn(case.hidden, generator=generator)).bfloat16().to(device)
    return x, residual, weight


def unfused(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, spec: QuantSpec
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Data [M, K], fp32 scales [M, G] and the sum, as vLLM computes them in separate steps."""
    h = x.float() if residual is None else x.float() + residual.float()
    y = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype) * weight
    groups = y.float().unflatten(-1, (-1, spec.group))
    s = groups.abs().amax(-1).clamp(min=1e-10) / torch.tensor(448.0, device=x.device)
    if spec.is_ue8m0:
        s = torch.exp2(s.clamp(min=1e-10).double().log2().ceil()).float()
    data = (groups / s.unsqueeze(-1)).clamp(-448.0, 448.0).flatten(-2).to(torch.float8_e4m3fn)
    return data, s, h.to(x.dtype)


def scales(q: QuantizedActivation, groups: int) -> torch.Tensor:
    """The scales as fp32 [M, G]; packed ones have the biased exponents of four groups in an int32, low bits first."""
    if q.spec.scale != "ue8m0_packed":
        return q.scale
    exponents = torch.stack([(q.scale >> (8 * i)) & 0xFF for i in range(4)], -1).flatten(-2)[:, :groups]
    return (exponents << 23).to(torch.int32).view(torch.float32)


def few(count: int) -> int:
    """How many of `count` values may come out of another rounding, since the order of the sum of squares is free."""
    return max(1, count // 100_000)


def check(case: Case, device: str) -> None:
    """Our op against the separate steps: format, scales, data, and the residual; the inputs stay as they were."""
    x, residual, weight = inputs(case, device)
    assert x.is_contiguous() != (case.strided and case.tokens > 1)
    before = x.clone(), residual.clone()
    if case.residual:
        q, total = nq.add_rms_norm_quant(x, residual, weight, EPS, spec=case.spec)
        data, s, h = unfused(x, residual, weight, case.spec)
        assert torch.equal(total, h)
    else:
        q = nq.rms_norm_quant(x, weight, EPS, spec=case.spec)
        data, s, _ = unfused(x, None, weight, case.spec)
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])
    assert_format(q, case)
    assert_near(q.data, scales(q, s.shape[1]), data, s, case.spec.group)


def assert_format(q: QuantizedActivation, case: Case) -> None:
    assert q.data.dtype == torch.float8_e4m3fn and q.data.shape == (case.tokens, case.hidden)
    assert q.data.is_contiguous() and q.scale.dtype == case.spec.scale_dtype
    groups = case.hidden // case.spec.group
    columns = -(-groups // 4) if case.spec.scale == "ue8m0_packed" else groups
    rows = -(-case.tokens // 4) * 4 if case.spec.layout == "col_tma" else case.tokens
    assert q.scale.shape == (case.tokens, columns)
    assert q.scale.stride() == ((columns, 1) if case.spec.layout == "row" else (1, rows))
    if case.spec.layout == "col_tma":
        assert not pad_rows(q.scale, rows).any()


def assert_near(data: torch.Tensor, scale: torch.Tensor, data_: torch.Tensor, scale_: torch.Tensor, group: int) -> None:
    other = ~torch.isclose(scale, scale_)
    assert int(other.sum()) <= few(scale.numel()), f"{int(other.sum())} of {scale.numel()} scales differ"
    a, b = data.float(), data_.float()
    differ = (~torch.isclose(a, b, atol=1e-6)).unflatten(-1, (-1, group)) & ~other.unsqueeze(-1)
    assert int(differ.sum()) <= few(a.numel()), f"{int(differ.sum())} of {a.numel()} values differ"
    a, b = a * scale.repeat_interleave(group, 1), b * scale_.repeat_interleave(group, 1)
    assert torch.allclose(a, b, rtol=5e-2, atol=5e-2)


def check_mixed_weight(spec: QuantSpec, with_residual: bool, device: str) -> None:
    """An fp32 weight beside bf16 activations is not rounded: no further from fp32 throughout than a bf16 one."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(32, 128, generator=generator) / 128).bfloat16().to(device)
    residual = torch.randn(32, 128, generator=generator).bfloat16().to(device)
    weight = (1 + torch.randn(128, generator=generator)).to(device)

    def quantized(w: torch.Tensor) -> QuantizedActivation:
        if with_residual:
            return nq.add_rms_norm_quant(x, residual, w, EPS, spec=spec)[0]
        return nq.rms_norm_quant(x, w, EPS, spec=spec)

    h = x.float() + residual.float() if with_residual else x.float()
    y = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS) * weight
    s = y.unflatten(-1, (-1, spec.group)).abs().amax(-1) / 448
    mixed, rounded = quantized(weight), quantized(weight.bfloat16())
    assert (mixed.scale - s).abs().mean() <= (rounded.scale - s).abs().mean() + 1e-6
    error, error_of_rounded = (
        (q.data.float() * q.scale.repeat_interleave(spec.group, 1) - y).abs().mean() for q in (mixed, rounded)
    )
    assert error <= error_of_rounded + 1e-6
