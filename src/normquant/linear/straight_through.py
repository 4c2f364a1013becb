"""The gradient of a block-FP8 linear layer with respect to its unquantized input."""

from __future__ import annotations

from typing import Any

import torch

from normquant.linear.weights import dequantize_weight


class StraightThrough(torch.autograd.Function):
    """`out`, the product of the quantized x and the weight, with the gradient of `F.linear(x, dequantized weight)`.

    The quantization counts as the identity (the straight-through estimator, Bengio et al. 2013): no value is clipped
    where the scale comes from amax. The weight gets no gradient.
    """

    @staticmethod
    def forward(x: torch.Tensor, out: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
        return out.view_as(out)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight = dequantize_weight(*ctx.saved_tensors).to(grad.dtype)  # [N, K]
        return grad @ weight, grad, None, None
