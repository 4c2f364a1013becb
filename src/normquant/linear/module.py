"""`torch.nn.Linear` with block-FP8 weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from normquant import reference
from normquant.linear.product import block_fp8_linear, check_spec
from normquant.linear.straight_through import StraightThrough
from normquant.linear.weights import (
    BLOCK,
    DequantizedWeight,
    check_bias,
    check_weight,
    dequantize_weight,
    exact_scale,
    pad_weight_scale,
    quantize_weight,
)
from normquant.ops import group_quant
from normquant.ops._tensors import shaped
from normquant.spec import QuantizedActivation, QuantSpec

LINEAR_SPEC = QuantSpec(layout="col_tma")  # the scale layout that scaled_mm takes without a copy


class BlockFP8Linear(torch.nn.Linear):
    """`torch.nn.Linear` with block-FP8 weights, for an activation [..., K] or a QuantizedActivation.

    weight: [N, K] float8_e4m3fn, K a multiple of 128; weight_scale: [ceil(N/128), ceil(K/128)] float32, or a narrower
    dtype, which is converted; bias: [N] or None.
    spec: how a plain activation is quantized.
    dtype: the dtype of activations, which `.to(dtype)`, `.half()` and the like change; they leave the fp8 weight and
    its scales as they are.

    The fp8 values are the parameter `weight_fp8`; `weight` is what it is in a Linear, a tensor of the activation dtype,
    dequantized where its values are read. A state dict has the names of DeepSeek checkpoints: `weight`, the fp8 values,
    and `weight_scale_inv`; `weight_scale` is loaded, too.
    Raises ValueError for anything else.
    """

    spec: QuantSpec
    dtype: torch.dtype
    weight_fp8: torch.nn.Parameter
    weight_scale_inv: torch.Tensor

    def __init__(
        self,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        bias: torch.Tensor | None = None,
        spec: QuantSpec = LINEAR_SPEC,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        torch.nn.Module.__init__(self)  # Linear's own would allocate a weight
        weight_scale = exact_scale(weight_scale)
        refuse_dtensor(weight)
        check_weight(weight, weight_scale)
        check_bias(bias, weight)
        check_spec(spec)
        self.out_features, self.in_features = weight.shape
        if self.in_features == 0 or self.in_features % BLOCK:
            raise ValueError(f"weight has K = {self.in_features}; K must be a positive multiple of {BLOCK}")
        self.spec, self.dtype = spec, dtype
        self.weight_fp8 = torch.nn.Parameter(weight, requires_grad=False)
        self.register_buffer("weight_scale_inv", pad_weight_scale(weight_scale))
        bias = None if bias is None else torch.nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(cls, linear: torch.nn.Linear, spec: QuantSpec = LINEAR_SPEC) -> BlockFP8Linear:
        """The block-quantized form of a linear layer."""
        refuse_dtensor(linear.weight)
        data, scale = quantize_weight(linear.weight.detach())
        layer = cls(data, scale, linear.bias, spec, linear.weight.dtype)
        return layer.train(linear.training)

    @property
    def weight_scale(self) -> torch.Tensor:
        """[ceil(N/128), ceil(K/128)] float32 in rows as cuBLASLt reads them, the buffer `weight_scale_inv`."""
        return self.weight_scale_inv

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """[N, K] in the activation dtype, dequantized where its values are read."""
        if torch.compiler.is_compiling():  # a compiler drops the product where nothing reads it
            return dequantize_weight(self.weight_fp8, self.weight_scale).to(self.dtype)
        return DequantizedWeight(self.weight_fp8, self.weight_scale, self.dtype)

    def forward(self, x: torch.Tensor | QuantizedActivation) -> torch.Tensor:
        """x [..., K], quantized here -> [..., N] in x's dtype; or already quantized -> [..., N] in the layer's dtype.

        x is bfloat16 or float16, of any strides: without evenly spaced rows it is copied. float32 is quantized by
        torch's own ops, without the kernel; under autocast it is cast first, as for a Linear.
        The gradient of x is that of `F.linear(x, self.weight)`: it passes straight through the quantization.
        """
        self._check_parameter()
        if isinstance(x, QuantizedActivation):
            return block_fp8_linear(x, self.weight_fp8, self.weight_scale, self.bias, self.dtype)
        if x.dtype == torch.float32 and _is_autocast(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        trains = torch.is_grad_enabled() and x.requires_grad
        q = self._quantize(x.detach() if trains else x)
        out = block_fp8_linear(q, self.weight_fp8, self.weight_scale, self.bias, x.dtype)
        out = shaped(out, x)
        return StraightThrough.apply(x, out, self.weight_fp8, self.weight_scale) if trains else out

    def reset_parameters(self) -> None:
        """Nothing: the weights are given."""

    def _check_parameter(self) -> None:
        refuse_dtensor(self.weight_fp8)
        if self.weight_fp8.dtype != torch.float8_e4m3fn:
            raise ValueError(
                f"weight_fp8 was cast to {self.weight_fp8.dtype}; where fully_shard has a MixedPrecisionPolicy with "
                f"param_dtype, give the block-FP8 layers a fully_shard of their own without it"
            )

    def _quantize(self, x: torch.Tensor) -> QuantizedActivation:
        if x.dim() == 0:
            raise ValueError("x is 0-dimensional; [..., K] is accepted")
        rows = x.reshape(-1, x.shape[-1])  # [M, K]
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        if x.dtype == torch.float32:
            return QuantizedActivation(*reference.group_quant(rows, self.spec), self.spec)
        return group_quant(rows, spec=self.spec)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> BlockFP8Linear:
        super()._apply(lambda t: fn(t) if t is self.bias else _apply_to_bits(fn, t), recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight_fp8.device)).dtype
        self.weight_scale_inv = pad_weight_scale(self.weight_scale)  # .to() and .cuda() close the gaps between rows
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = destination.pop(f"{prefix}weight_fp8")

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        weight, fp8, scale = (prefix + name for name in ("weight", "weight_fp8", "weight_scale_inv"))
        if scale not in state_dict and f"{prefix}weight_scale" in state_dict:
            state_dict[scale] = state_dict.pop(f"{prefix}weight_scale")
        if scale in state_dict:
            state_dict[scale] = exact_scale(state_dict[scale])
        if wrong := _wrong_dtypes(state_dict, {weight: torch.float8_e4m3fn, scale: torch.float32}):
            errors.extend(wrong)
            return
        if weight in state_dict:
            state_dict[fp8] = state_dict.pop(weight)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        missing[:] = [weight if name == fp8 else name for name in missing]
        self.weight_scale_inv = pad_weight_scale(self.weight_scale)  # assign=True takes the tensor as it is

    def __getstate__(self) -> dict[str, Any]:
        bits = self.weight_fp8.detach().view(torch.uint8)  # pickle reads no fp8 storage back
        return vars(self) | {"_parameters": self._parameters | {"weight_fp8": bits}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        weight = state["_parameters"]["weight_fp8"].view(torch.float8_e4m3fn)
        self._parameters["weight_fp8"] = torch.nn.Parameter(weight, requires_grad=False)


def _is_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _apply_to_bits(fn: Callable[[torch.Tensor], torch.Tensor], t: torch.Tensor) -> torch.Tensor:
    """fn(t) in t's dtype: `Module.to(dtype)` converts floating-point tensors and moves integers as they are."""
    bits = {1: torch.uint8, 4: torch.int32}[t.itemsize]
    applied = fn(t.view(bits))
    return applied.view(t.dtype) if applied.dtype == bits else t.to(applied.device)  # Module.type() converts integers


def _wrong_dtypes(state_dict: dict[str, Any], expected: dict[str, torch.dtype]) -> list[str]:
    return [
        f"{name} is {state_dict[name].dtype}; {dtype} is accepted (quantize a model in place with block_fp8)"
        for name, dtype in expected.items()
        if name in state_dict and state_dict[name].dtype != dtype
    ]


def refuse_dtensor(weight: torch.Tensor) -> None:
    """Raise ValueError for a weight that is sharded, or of another tensor subclass."""
    if is_traceable_wrapper_subclass(weight):
        raise ValueError(
            f"weight is a {type(weight).__name__}; a plain tensor is accepted: call block_fp8 before fully_shard, "
            "which gathers the weight for the product, and for tensor parallelism give each rank a layer of its rows"
        )
