"""Bytes that each op must move through DRAM, whatever computes it: every input read once, every output written once.

All functions take the number of rows m, the width k and the quantization, and return (bytes read, bytes written).
Activations have 2 bytes a value; weights are counted once, 2 bytes a value where nothing else is said.
"""

from __future__ import annotations

from normquant.spec import QuantSpec

Traffic = tuple[int, int]
ACTIVATION_BYTES = 2


def rms_norm_quant(
    m: int,
    k: int,
    spec: QuantSpec,
    *,
    residual: bool = False,
    normed: bool = False,
    weight_bytes: int = ACTIVATION_BYTES,
) -> Traffic:
    """x (and the residual) and the weight in; data and scale (and the sum, and the norm) out.

    weight_bytes: bytes of one value of the weight.
    """
    row = m * k * ACTIVATION_BYTES
    return row * (1 + residual) + k * weight_bytes, spec.bytes(m, k) + row * (residual + normed)


def group_quant(m: int, k: int, spec: QuantSpec) -> Traffic:
    """x in; data and scale out."""
    return m * k * ACTIVATION_BYTES, spec.bytes(m, k)


def silu_mul_quant(m: int, k: int, spec: QuantSpec) -> Traffic:
    """gate and up in, k values each; data and scale out."""
    return 2 * m * k * ACTIVATION_BYTES, spec.bytes(m, k)


def latent_norm_quant(m: int, q: int, c: int, r: int, spec: QuantSpec, *, quantize_kv: bool = False) -> Traffic:
    """The qkv_a row, both weights, and a row of cos and sin in; q data and scale, kv norm and k_pe out."""
    read = (m * (q + c + r) + q + c + m * r) * ACTIVATION_BYTES
    return read, spec.bytes(m, q) + m * (c + r) * ACTIVATION_BYTES + (spec.bytes(m, c) if quantize_kv else 0)


def rope_last(m: int, k: int, r: int) -> Traffic:
    """A row of k values and a row of cos and sin, r values, in; the row out."""
    return m * (k + r) * ACTIVATION_BYTES, m * k * ACTIVATION_BYTES
