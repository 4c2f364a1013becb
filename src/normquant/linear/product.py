"""The product of block-quantized activations and weights: [M, K] fp8, 1x128 scales, times [N, K] fp8, 128x128 scales.

Where a measured table says that it is the faster, K is split (`split_product`). Else, on Hopper and with N a multiple
of 16, it is `torch.nn.functional.scaled_mm` (cuBLASLt); elsewhere both operands are dequantized to fp32 and multiplied,
which is right and slow.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from normquant.linear import _sharding
from normquant.linear.choice import PRODUCT, SCALED_MM, Rivals, choose
from normquant.linear.split_product import Launcher, launch_product
from normquant.linear.weights import BLOCK, check_bias, check_weight, dequantize_weight, pad_weight_scale
from normquant.ops import LIBRARY
from normquant.ops._gradients import refuse_gradients
from normquant.ops._op import cached, call_directly, without_gradient
from normquant.ops._sharding import add_rules
from normquant.spec import TMA_ALIGN, QuantizedActivation, QuantSpec

HOPPER = (9, 0)
CUBLASLT_COLUMNS = 16  # N must be a multiple of it
OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
RIVALS: Rivals = (SCALED_MM,)  # what runs where K is not split

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
    Raises ValueError for anything else, RuntimeError where q, weight or weight_scale require grad.
    """
    check_spec(q.spec)
    check_bias(bias, weight)
    data, scale = q.data, q.scale
    if data.dim() != 2:  # a view would restride the scales of a single row
        data, scale = data.view(-1, data.shape[-1]), scale.view(-1, scale.shape[-1])
    out = torch.ops.normquant.block_fp8_linear(data, scale, weight, weight_scale, out_dtype)
    out = out.view(*q.shape[:-1], weight.shape[0])
    return out if bias is None else out + bias.to(out_dtype)


def check_spec(spec: QuantSpec) -> None:
    """The activation's groups must be as wide as the weight's blocks, its scales of four bytes each."""
    if spec.group != BLOCK or spec.scale == "ue8m0_packed":
        raise ValueError(
            f"the activation has group {spec.group} and scale {spec.scale!r}; accepted: 128, fp32 or ue8m0"
        )


def check_product(
    data: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, out_dtype: torch.dtype
) -> None:
    """Raise ValueError for arguments that the op does not accept, RuntimeError where a gradient would be lost."""
    refuse_gradients("block_fp8_linear", (data, scale, weight, weight_scale))
    check_weight(weight, weight_scale)
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
    check_product(data, scale, weight, weight_scale, out_dtype)
    return data.new_empty((data.shape[0], weight.shape[0]), dtype=out_dtype)


def dequantized_linear(data, scale, weight, weight_scale, out_dtype):
    """The product in fp32 on any device: data [M, K] fp8, scale [M, K/128], weight [N, K] fp8 -> [M, N]."""
    check_product(data, scale, weight, weight_scale, out_dtype)
    x = (data.float().unflatten(1, (-1, BLOCK)) * scale.unsqueeze(-1)).flatten(1)  # [M, K] fp32
    with torch.autocast(data.device.type, enabled=False):  # which would multiply in bf16
        return (x @ dequantize_weight(weight, weight_scale).t()).to(out_dtype)


def _launch_split(*args: Any) -> Launcher:
    check_product(*args)
    return launch_product(*args)


_split = cached("block_fp8_linear", _launch_split)


def _on_cuda(data, scale, weight, weight_scale, out_dtype):
    (m, k), n = data.shape, weight.shape[0]
    run = _split if choose(PRODUCT, k, n, m, data.device, rivals=RIVALS).split else scaled_product
    return run(data, scale, weight, weight_scale, out_dtype)


def scaled_product(data, scale, weight, weight_scale, out_dtype):
    takes = torch.cuda.get_device_capability(data.device) == HOPPER and weight.shape[0] % CUBLASLT_COLUMNS == 0
    if not takes or data.shape[0] == 0:
        return dequantized_linear(data, scale, weight, weight_scale, out_dtype)
    check_product(data, scale, weight, weight_scale, out_dtype)
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
LIBRARY.impl("block_fp8_linear", _on_cuda, "CUDA")
call_directly(torch.ops.normquant.block_fp8_linear.default, _on_cuda)
without_gradient("block_fp8_linear")
add_rules(torch.ops.normquant.block_fp8_linear.default, _sharding.rules)
