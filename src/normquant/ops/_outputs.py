"""What the ops share about their outputs."""

from __future__ import annotations

from typing import Any

import torch

from normquant.spec import QuantizedActivation, QuantSpec

ACTIVATION_BYTES = 2


def fake_quant(x: torch.Tensor, m: Any, k: Any, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialized data and scale of an [m, k] activation, on x's device; m and k may be symbolic."""
    scale = x.new_empty_strided(spec.scale_shape(m, k), spec.scale_stride(m, k), dtype=spec.scale_dtype)
    return x.new_empty((m, k), dtype=spec.dtype), scale


def activation(lead: torch.Size, quantized: tuple[torch.Tensor, ...], spec: QuantSpec) -> QuantizedActivation:
    """Data and scale with their leading dimensions back."""
    data, scale = quantized
    if len(lead) == 1:  # a view would restride a single row
        return QuantizedActivation(data, scale, spec)
    return QuantizedActivation(data.view(*lead, data.shape[-1]), scale.view(*lead, scale.shape[-1]), spec)
