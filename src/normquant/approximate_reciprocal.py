"""The GPU's approximate reciprocal, `rcp.approx.ftz.f32`, of numbers that come from bfloat16 or float16.

Code built with fast math divides with it. It is off by at most one unit in the last place, always for the same
mantissas: those below, of the 1024 that float16 has, as read off an H100; bfloat16's are every eighth of them. The
exponent plays no part.
"""

from __future__ import annotations

from functools import cache

import torch

from normquant.spec import FP8_MAX

# fmt: off
TOO_LOW = (
    6, 14, 32, 46, 62, 70, 77, 86, 87, 88, 126, 127, 135, 160, 176, 179, 214, 219, 221, 274, 287, 325, 349, 401, 415,
    443, 445, 473, 474, 558, 614, 751, 783, 950, 954, 956, 957, 965, 1010, 1016,
)
TOO_HIGH = (
    11, 17, 18, 20, 48, 91, 97, 98, 104, 105, 113, 138, 147, 148, 153, 203, 204, 209, 225, 226, 252, 260, 296, 298, 304,
    305, 346, 371, 386, 395, 396, 403, 408, 409, 417, 425, 439, 449, 453, 454, 458, 467, 481, 488, 498, 505, 507, 519,
    520, 521, 528, 531, 543, 547, 563, 564, 627, 647, 648, 650, 651, 667, 675, 676, 687, 700, 701, 724, 728, 785, 786,
    787, 789, 805, 807, 813, 823, 872, 874, 876, 878, 893, 920, 923, 928, 944, 968, 987, 988, 997,
)


# Of f = 448 / amax, which has all 24 bits: by amax's mantissa, as above.
FACTOR_TOO_LOW = (
    21, 50, 84, 138, 167, 177, 210, 226, 251, 302, 319, 367, 389, 395, 455, 477, 499, 501, 519, 521, 538, 539, 550, 561,
    582, 629, 640, 658, 661, 665, 669, 691, 705, 719, 720, 730, 742, 745, 779, 780, 829, 888,
)
FACTOR_TOO_HIGH = (
    17, 18, 30, 41, 55, 59, 61, 72, 79, 87, 123, 147, 148, 150, 157, 163, 174, 175, 182, 207, 217, 234, 257, 268, 282,
    292, 293, 332, 346, 379, 407, 412, 414, 430, 432, 436, 443, 444, 446, 463, 474, 484, 516, 546, 553, 598, 599, 602,
    603, 610, 621, 622, 683, 696, 735, 737, 738, 751, 753, 796, 798, 810, 815, 840, 854, 865, 892, 893, 906, 910, 915,
    920, 937, 966, 967, 971, 974, 987, 992, 1005,
)
# fmt: on


def approximate_reciprocal(x: torch.Tensor) -> torch.Tensor:
    """What the GPU's instruction gives for 1/x: x fp32 of any shape, with at most 11 significant bits.

    Other values get the correctly rounded reciprocal. So do those of which it would be no normal number, which the
    instruction flushes to zero.
    """
    return _off(x.reciprocal(), x, "reciprocal")


def flushed_factor(amax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """f = (1 / amax) * 448 and 1 / f as code built with fast math computes both.

    amax: fp32, not negative, at most 11 significant bits. Inputs and results that are no normal numbers count as zero.
    """
    factor = flush(approximate_reciprocal(flush(amax))) * FP8_MAX
    return factor, flush(_off(factor.reciprocal(), amax, "factor"))


def flush(x: torch.Tensor) -> torch.Tensor:
    """Denormals as zeros of their sign."""
    return torch.where(x.abs() < torch.finfo(torch.float32).tiny, x * 0.0, x)


def _off(exact: torch.Tensor, x: torch.Tensor, what: str) -> torch.Tensor:
    """`exact`, off by as much as the instruction is for the mantissa of x."""
    bits = x.view(torch.int32)
    known = (bits & 0x1FFF == 0) & x.isfinite() & exact.isfinite() & (exact != 0)
    off = torch.where(known, _errors(what, x.device)[((bits >> 13) & 0x3FF).long()], 0)
    return (exact.view(torch.int32) + off).view(torch.float32)


@cache
def _errors(what: str, device: torch.device) -> torch.Tensor:
    """By mantissa, in units of the last place: [1024] int32."""
    low, high = {"reciprocal": (TOO_LOW, TOO_HIGH), "factor": (FACTOR_TOO_LOW, FACTOR_TOO_HIGH)}[what]
    errors = torch.zeros(1024, dtype=torch.int32)
    errors[list(low)] = -1
    errors[list(high)] = 1
    return errors.to(device)
