"""silu(g) = g / (1 + exp(-g)) on the device, as torch's CUDA kernel has it."""

import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

from normquant.kernels._device import reciprocal_approximate


@triton.jit
def silu(g, ON_CUDA: tl.constexpr):
    # expf and the division are those of torch's CUDA kernel: the approximate ones would move values across a rounding.
    if ON_CUDA:
        return divide(g, 1.0 + libdevice.exp(g * -1.0))
    return tl.div_rn(g, 1.0 + tl.exp(g * -1.0))


@triton.jit
def divide(g, d):
    # g / d for d >= 1 as IEEE division has it, without the branch of tl.div_rn: the same steps, from an approximate
    # reciprocal through two residuals. d / 4 keeps that reciprocal out of the denormals, which the hardware flushes.
    c = d * 0.25
    approximate = reciprocal_approximate(c)
    r = tl.fma(approximate, tl.fma(c * -1.0, approximate, 1.0), approximate)
    q = g * r
    for _ in tl.static_range(2):  # written so that a residual of zero leaves the sign of zero
        excess = tl.fma(c, q, g * -1.0)
        q = tl.fma(excess * -1.0, r, q)
    # One, inf and NaN as d: residuals would be inf * 0 for some g, and the approximate reciprocal is exact.
    return tl.where((d > 1.0) & (d < float("inf")), q * 0.25, g * (approximate * 0.25))
