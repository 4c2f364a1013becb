"""Stand-ins for the operations that vLLM's graphs hold when the pass runs: the same names, schemas and arithmetic."""

from __future__ import annotations

import torch

from normquant import reference
from normquant.spec import QuantSpec

_C = torch.library.Library("_C", "FRAGMENT")
_IR = torch.library.Library("vllm_ir", "FRAGMENT")
_ARGS = "int group_size, float eps, float fp8_min, float fp8_max"

_C.define(
    f"per_token_group_fp8_quant(Tensor input, Tensor(a!) output_q, Tensor(b!) output_s, {_ARGS}, bool scale_ue8m0, "
    "bool dummy_is_scale_transposed, bool dummy_is_tma_aligned) -> ()"
)
_C.define(
    f"per_token_group_fp8_quant_packed(Tensor input, Tensor(a!) output_q, Tensor(b!) output_s_packed, {_ARGS}) -> ()"
)
_IR.define("rms_norm(Tensor x, Tensor? weight, float epsilon, int? variance_size=None) -> Tensor")
_IR.define(
    "fused_add_rms_norm(Tensor x, Tensor x_residual, Tensor? weight, float epsilon, int? variance_size=None) "
    "-> (Tensor, Tensor)"
)


def _quant(x, output_q, output_s, group_size, eps, fp8_min, fp8_max, scale_ue8m0, transposed, tma_aligned):
    floor = 1e-10 if scale_ue8m0 else 0.0
    spec = QuantSpec(group=group_size, floor=eps, scale_by="divide", scale_floor=floor)
    data, scale = reference.group_quant(x, spec.replace(scale="ue8m0") if scale_ue8m0 else spec)
    output_q.copy_(data)
    output_s.copy_(scale)


def _packed(x, output_q, output_s_packed, group_size, eps, fp8_min, fp8_max):
    spec = QuantSpec(
        group=group_size, floor=eps, scale_by="divide", scale_floor=1e-10, scale="ue8m0_packed", layout="col_tma"
    )
    data, scale = reference.group_quant(x, spec)
    output_q.copy_(data)
    output_s_packed.copy_(scale)


def _norm(h, weight, epsilon, dtype):
    n = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + epsilon)
    return (n if weight is None else n.to(weight.dtype) * weight).to(dtype)


def _rms_norm(x, weight, epsilon, variance_size=None):
    return _norm(x.float(), weight, epsilon, x.dtype)


def _add_rms_norm(x, x_residual, weight, epsilon, variance_size=None):
    h = x.float() + x_residual.float()
    return _norm(h, weight, epsilon, x.dtype), h.to(x.dtype)


_C.impl("per_token_group_fp8_quant", _quant, "CPU")
_C.impl("per_token_group_fp8_quant_packed", _packed, "CPU")
_IR.impl("rms_norm", _rms_norm, "CPU")
_IR.impl("fused_add_rms_norm", _add_rms_norm, "CPU")
torch.library.register_fake("_C::per_token_group_fp8_quant", lambda *args: None, lib=_C)
torch.library.register_fake("_C::per_token_group_fp8_quant_packed", lambda *args: None, lib=_C)
torch.library.register_fake("vllm_ir::rms_norm", lambda x, *args, **kw: torch.empty_like(x), lib=_IR)
torch.library.register_fake(
    "vllm_ir::fused_add_rms_norm", lambda x, *args, **kw: (torch.empty_like(x), torch.empty_like(x)), lib=_IR
)


def per_token_group_fp8_quant(
    y: torch.Tensor, group: int = 128, eps: float = 1e-10, ue8m0: bool = False, layout: str = "row"
) -> tuple[torch.Tensor, torch.Tensor]:
    """The op called as vLLM calls it, on outputs that it allocates."""
    m, k = y.shape
    data = torch.empty(y.shape, dtype=torch.float8_e4m3fn, device=y.device)
    groups = k // group
    if layout == "row":
        scale = torch.empty((m, groups), dtype=torch.float32, device=y.device)
    elif layout == "col":
        scale = torch.empty((groups, m), dtype=torch.float32, device=y.device).permute(-1, -2)
    else:
        rows = (m + 3) // 4 * 4
        scale = torch.empty_strided((m, groups), (1, rows), dtype=torch.float32, device=y.device)
    torch.ops._C.per_token_group_fp8_quant(
        y, data, scale, group, eps, -448.0, 448.0, ue8m0, layout != "row", layout == "col_tma"
    )
    return data, scale


def per_token_group_fp8_quant_packed(
    y: torch.Tensor, group: int = 128, eps: float = 1e-10
) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed exponents in the TMA-aligned layout."""
    m, k = y.shape
    data = torch.empty(y.shape, dtype=torch.float8_e4m3fn, device=y.device)
    rows = (m + 3) // 4 * 4
    scale = torch.empty_strided((m, (k // group + 3) // 4), (1, rows), dtype=torch.int32, device=y.device)
    torch.ops._C.per_token_group_fp8_quant_packed(y, data, scale, group, eps, -448.0, 448.0)
    return data, scale
