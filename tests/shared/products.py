"""Products of block-quantized rows for tests, and what runs the kernels of split ones in the interpreter."""

from __future__ import annotations

import torch
from shared import interpreter
from shared.inputs import activations
from shared.linear_weights import weight_of

from normquant import QuantSpec, reference
from normquant.linear import PAIRS, quantize_weight
from normquant.linear.split_product import launch_pair, launch_product

FEW = QuantSpec(layout="col_tma")


def factors(
    m: int, n: int, k: int, spec: QuantSpec = FEW, x: torch.Tensor | None = None, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, ...]:
    """data [M, K], scale, weight [N, K], weight_scale."""
    data, scale = reference.group_quant(activations(m, k, dtype) if x is None else x, spec)
    return data, scale, *quantize_weight(weight_of(n, k))


def parts_of(*args):
    """The partial sums of the product's kernel, [P * M, N], for its arguments; for `interpreter.call`."""
    from normquant.kernels.block_fp8_linear import block_fp8_linear

    return block_fp8_linear(*args)


def product_of(*args):
    """The product's kernel and the sum's, for the arguments of the op; for `interpreter.call`."""
    return launch_product(*args)(*args[:4])


def pair_of(name: str, *args):
    """The kernels of a pair, for the arguments of its op, the spec decoded; for `interpreter.call`."""
    launch = launch_pair(PAIRS[name].op, args[:5], args[7:])
    return launch(*(arg for arg in args if isinstance(arg, torch.Tensor)))


def run(function, *args):
    """What one of these gives in the interpreter."""
    return interpreter.call(function, *args)
