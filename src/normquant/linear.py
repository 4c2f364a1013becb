"""A linear layer on block-quantized activations: [M, K] fp8 with 1x128 scales times [N, K] fp8 with 128x128 scales.

Weights are in the layout of DeepSeek checkpoints. On Hopper, with N a multiple of 16, the product is
`torch.nn.functional.scaled_mm` (cuBLASLt); elsewhere both operands are dequantized to fp32 and multiplied, which is
right and slow.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from normquant.ops import LIBRARY, group_quant
from normquant.spec import FP8_MAX, TMA_ALIGN, QuantizedActivation, QuantSpec

BLOCK = 128
HOPPER = (9, 0)
CUBLASLT_COLUMNS = 16  # N must be a multiple of it
LINEAR_SPEC = QuantSpec(layout="col_tma")  # the scale layout that scaled_mm takes without a copy
OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

LIBRARY.define(
    "block_fp8_linear(Tensor data, Tensor scale, Tensor weight, Tensor weight_scale, ScalarType out_dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)


def block_fp8_linear(
    q: QuantizedActivation,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """q @ weight.T + bias, dequantized: [..., K] -> [..., N] in `out_dtype`.

    q: group 128, scales fp32 or ue8m0 in any layout; "col_tma" reaches the GPU's GEMM without a copy.
    weight: [N, K] float8_e4m3fn, contiguous. weight_scale: [ceil(N/128), ceil(K/128)] float32; a weight value is
    weight * its block's scale. bias: [N] or None. out_dtype: bfloat16, float16 or float32.
    Raises ValueError for anything else.
    """
    if q.spec.group != BLOCK or q.spec.scale == "ue8m0_packed":
        raise ValueError(
            f"the activation has group {q.spec.group} and scale {q.spec.scale!r}; accepted: 128, fp32 or ue8m0"
        )
    _check_bias(bias, weight)
    data, scale = q.data, q.scale
    if data.dim() != 2:  # a view would restride the scales of a single row
        data, scale = data.view(-1, data.shape[-1]), scale.view(-1, scale.shape[-1])
    out = torch.ops.normquant.block_fp8_linear(data, scale, weight, weight_scale, out_dtype)
    out = out.view(*q.shape[:-1], weight.shape[0])
    return out if bias is None else out + bias.to(out_dtype)


class BlockFP8Linear(torch.nn.Module):
    """`torch.nn.Linear` with block-FP8 weights, for an activation [..., K] or a QuantizedActivation.

    weight: [N, K] float8_e4m3fn; weight_scale: [ceil(N/128), ceil(K/128)] float32; bias: [N] or None.
    spec: how a plain activation is quantized.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        bias: torch.Tensor | None = None,
        spec: QuantSpec = LINEAR_SPEC,
    ) -> None:
        super().__init__()
        _check_weight(weight, weight_scale)
        _check_bias(bias, weight)
        self.spec = spec
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.register_buffer("weight_scale", pad_weight_scale(weight_scale))
        self.bias = None if bias is None else torch.nn.Parameter(bias.detach(), requires_grad=False)

    weight_scale: torch.Tensor

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> BlockFP8Linear:
        super()._apply(fn, recurse)
        self.weight_scale = pad_weight_scale(self.weight_scale)  # .to() and .cuda() close the gaps between rows
        return self

    @classmethod
    def from_linear(cls, linear: torch.nn.Linear, spec: QuantSpec = LINEAR_SPEC) -> BlockFP8Linear:
        """The block-quantized form of a linear layer."""
        return cls(*quantize_weight(linear.weight.detach()), linear.bias, spec=spec)

    def forward(self, x: torch.Tensor | QuantizedActivation) -> torch.Tensor:
        """x [..., K] bfloat16 or float16, quantized here, or already quantized -> [..., N] in x's dtype (bfloat16)."""
        if isinstance(x, QuantizedActivation):
            return block_fp8_linear(x, self.weight, self.weight_scale, self.bias)
        return block_fp8_linear(group_quant(x, spec=self.spec), self.weight, self.weight_scale, self.bias, x.dtype)


def block_fp8(module: torch.nn.Module, spec: QuantSpec = LINEAR_SPEC) -> torch.nn.Module:
    """Replace every `nn.Linear` inside `module`, in place, by its block-quantized form; returns `module`.

    Linears whose K is not a multiple of 128 stay as they are.
    """
    for name, child in module.named_children():
        if isinstance(child, torch.nn.Linear) and child.in_features % BLOCK == 0:
            setattr(module, name, BlockFP8Linear.from_linear(child, spec))
        else:
            block_fp8(child, spec)
    return module


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, K] any float -> [N, K] float8_e4m3fn and [ceil(N/128), ceil(K/128)] float32, s = amax / 448 of each block."""
    if weight.dim() != 2 or not weight.dtype.is_floating_point:
        raise ValueError(
            f"weight is {tuple(weight.shape)} {weight.dtype}; [N, K] of a floating-point dtype is accepted"
        )
    n, k = weight.shape
    padded = F.pad(weight.float(), (0, -k % BLOCK, 0, -n % BLOCK))
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))  # [N/128, 128, K/128, 128]
    scale = blocks.abs().amax((1, 3)).clamp(min=1e-10) / FP8_MAX  # [N/128, K/128]
    data = (blocks / scale[:, None, :, None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return data.flatten(2, 3).flatten(0, 1)[:n, :k].contiguous(), scale


def dequantize_weight(weight: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
    """weight [N, K] fp8 times its block's scale, fp32."""
    n, k = weight.shape
    scale = weight_scale.repeat_interleave(BLOCK, 0)[:n].repeat_interleave(BLOCK, 1)[:, :k]
    return weight.float() * scale


def pad_weight_scale(weight_scale: torch.Tensor) -> torch.Tensor:
    """The same [N/128, K/128] scales with rows a multiple of 4 apart and the gaps zero, as cuBLASLt reads them."""
    return F.pad(weight_scale, (0, -weight_scale.shape[1] % TMA_ALIGN))[:, : weight_scale.shape[1]]


def _check_weight(weight: torch.Tensor, weight_scale: torch.Tensor) -> None:
    if weight.dim() != 2 or weight.dtype != torch.float8_e4m3fn or not weight.is_contiguous():
        raise ValueError(
            f"weight is {tuple(weight.shape)} {weight.dtype} with stride {weight.stride()}; "
            f"[N, K] float8_e4m3fn, contiguous, is accepted"
        )
    expected = tuple((size + BLOCK - 1) // BLOCK for size in weight.shape)
    if tuple(weight_scale.shape) != expected or weight_scale.dtype != torch.float32:
        raise ValueError(
            f"weight_scale is {tuple(weight_scale.shape)} {weight_scale.dtype}; a weight of shape "
            f"{tuple(weight.shape)} takes {expected} float32"
        )
    if weight_scale.device != weight.device:
        raise ValueError(
            f"weight_scale is on {weight_scale.device} and weight on {weight.device}; one device is needed"
        )


def _check_bias(bias: torch.Tensor | None, weight: torch.Tensor) -> None:
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be [N] = [{weight.shape[0]}]")


def _check(
    data: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, out_dtype: torch.dtype
) -> None:
    _check_weight(weight, weight_scale)
    m, k = data.shape
    if data.dtype != torch.float8_e4m3fn:
        raise ValueError(f"data has dtype {data.dtype}; float8_e4m3fn is accepted")
    if weight.shape[1] != k or k % BLOCK:
        raise ValueError(f"data has K = {k} and weight {weight.shape[1]}; they must be one multiple of {BLOCK}")
    if scale.shape[0] != m or scale.shape[1] != k // BLOCK or scale.dtype != torch.float32:
        raise ValueError(f"scale is {tuple(scale.shape)} {scale.dtype}; data {(m, k)} takes {(m, k // BLOCK)} float32")
    if len({t.device for t in (data, scale, weight)}) != 1:
        raise ValueError(
            f"data, scale and weight are on {data.device}, {scale.device} and {weight.device}; one is needed"
        )
    if out_dtype not in OUT_DTYPES:
        raise ValueError(f"out_dtype is {out_dtype}; accepted: {', '.join(map(str, OUT_DTYPES))}")


@torch.library.register_fake("normquant::block_fp8_linear", lib=LIBRARY)
def _(data, scale, weight, weight_scale, out_dtype):
    _check(data, scale, weight, weight_scale, out_dtype)
    return data.new_empty((data.shape[0], weight.shape[0]), dtype=out_dtype)


def dequantized_linear(data, scale, weight, weight_scale, out_dtype):
    """The product in fp32 on any device: data [M, K] fp8, scale [M, K/128], weight [N, K] fp8 -> [M, N]."""
    _check(data, scale, weight, weight_scale, out_dtype)
    x = (data.float().unflatten(1, (-1, BLOCK)) * scale.unsqueeze(-1)).flatten(1)
    return (x @ dequantize_weight(weight, weight_scale).t()).to(out_dtype)


def _scaled_mm(data, scale, weight, weight_scale, out_dtype):
    takes = torch.cuda.get_device_capability(data.device) == HOPPER and weight.shape[0] % CUBLASLT_COLUMNS == 0
    if not takes or data.shape[0] == 0:
        return dequantized_linear(data, scale, weight, weight_scale, out_dtype)
    _check(data, scale, weight, weight_scale, out_dtype)
    from torch.nn.functional import ScalingType, scaled_mm

    m, groups = scale.shape
    rows = (m + TMA_ALIGN - 1) // TMA_ALIGN * TMA_ALIGN
    if rows != m:  # cuBLASLt takes rows in fours; the padding costs a copy of a few rows' data
        data = F.pad(data.view(torch.uint8), (0, 0, 0, rows - m)).view(data.dtype)
    if scale.stride() == (1, rows) and _holds(scale, rows * groups):
        scale = scale.as_strided((rows, groups), (1, rows))  # col_tma: the padding rows are there and zero
    else:
        scale = F.pad(scale.t(), (0, rows - m)).contiguous().t()
    columns = (groups + TMA_ALIGN - 1) // TMA_ALIGN * TMA_ALIGN
    if weight_scale.stride() != (columns, 1) or not _holds(weight_scale, weight_scale.shape[0] * columns):
        weight_scale = pad_weight_scale(weight_scale)
    by_k = weight_scale.as_strided((columns, weight_scale.shape[0]), (1, columns))  # [K/128 in fours, N/128]
    out = scaled_mm(
        data, weight.t(), scale, ScalingType.BlockWise1x128, by_k, ScalingType.BlockWise128x128, output_dtype=out_dtype
    )
    return out if rows == m else out[:m]


def _holds(t: torch.Tensor, elements: int) -> bool:
    return t.untyped_storage().nbytes() // t.itemsize - t.storage_offset() >= elements


LIBRARY.impl("block_fp8_linear", dequantized_linear, "CPU")
LIBRARY.impl("block_fp8_linear", _scaled_mm, "CUDA")
