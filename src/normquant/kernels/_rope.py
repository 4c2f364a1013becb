"""What the kernels with a rotary position embedding share on the device; as `normquant.reference.rotate`."""

import triton
import triton.language as tl


@triton.jit
def turn(a, b, cos, sin, SPEC: tl.constexpr, DTYPE: tl.constexpr):
    # Pairs (a, b) turned by their angles, all fp32 -> the firsts and the seconds of the pairs, DTYPE.
    u = product(a, cos, SPEC, DTYPE) - product(b, sin, SPEC, DTYPE)
    v = product(b, cos, SPEC, DTYPE) + product(a, sin, SPEC, DTYPE)
    return u.to(DTYPE), v.to(DTYPE)


@triton.jit
def product(a, b, SPEC: tl.constexpr, DTYPE: tl.constexpr):
    p = a * b
    if SPEC.rounding == "inner" or SPEC.rounding == "twice":
        p = p.to(DTYPE).to(tl.float32)
    return p
