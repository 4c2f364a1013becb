"""Weights in FP8 with one fp32 scale per block of 128x128, the layout of DeepSeek checkpoints."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only

from normquant.spec import FP8_MAX, TMA_ALIGN

BLOCK = 128
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)  # all of whose values fp32 has
_READ_ONLY = (
    "the weight of a BlockFP8Linear is dequantized at each use and cannot be changed in place; load its fp8 values and "
    "their scales with load_state_dict, or make a new layer with BlockFP8Linear.from_linear"
)


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


def exact_scale(weight_scale: torch.Tensor) -> torch.Tensor:
    """The scales as fp32; as they are where the conversion could round."""
    return weight_scale.float() if weight_scale.dtype in SCALE_DTYPES else weight_scale


def check_weight(weight: torch.Tensor, weight_scale: torch.Tensor) -> None:
    """weight must be [N, K] fp8, contiguous, and weight_scale [ceil(N/128), ceil(K/128)] fp32 on its device."""
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


def check_bias(bias: torch.Tensor | None, weight: torch.Tensor) -> None:
    """bias must be [N]."""
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be [N] = [{weight.shape[0]}]")


class DequantizedWeight(torch.Tensor):
    """A block-FP8 weight as a tensor of the activation dtype, [N, K], that is dequantized by each op that reads it.

    Its dtype, device and shape cost nothing. It cannot be written: that raises a RuntimeError.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, weight_fp8: torch.Tensor, weight_scale: torch.Tensor, dtype: torch.dtype) -> DequantizedWeight:
        return torch.Tensor._make_wrapper_subclass(cls, weight_fp8.shape, dtype=dtype, device=weight_fp8.device)

    def __init__(self, weight_fp8: torch.Tensor, weight_scale: torch.Tensor, dtype: torch.dtype) -> None:
        self.weight_fp8 = weight_fp8.detach()
        self.weight_scale = weight_scale

    def dense(self) -> torch.Tensor:
        """The values as an ordinary tensor."""
        return dequantize_weight(self.weight_fp8, self.weight_scale).to(self.dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _writes(func, args, kwargs):
            raise RuntimeError(_READ_ONLY)
        if func is torch.ops.aten.detach.default:  # `.data`, which callers write to
            return DequantizedWeight(args[0].weight_fp8, args[0].weight_scale, args[0].dtype)
        return func(*tree_map_only(cls, cls.dense, args), **tree_map_only(cls, cls.dense, kwargs))

    def data_ptr(self) -> NoReturn:
        raise RuntimeError("the weight of a BlockFP8Linear has no memory of its own; give a kernel its clone()")

    def __setitem__(self, index: Any, value: Any) -> NoReturn:
        raise RuntimeError(_READ_ONLY)  # it would write to a dequantized copy of one part

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DequantizedWeight({tuple(self.shape)}, dtype={self.dtype}, device='{self.device}')"


def _writes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the op writes to an argument that is a DequantizedWeight."""
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    written = {a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    return any(isinstance(given.get(name), DequantizedWeight) for name in written)
