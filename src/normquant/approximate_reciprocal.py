"""The GPU's approximate reciprocal, `rcp.approx.ftz.f32`, of numbers that come from bfloat16 or float16.

Code built with fast math divides with it. It is off by at most one unit in the last place, always for the same
mantissas: those below, of the 1024 that float16 has, as read off an H100; bfloat16's are every eighth of them. The
exponent plays no part.
"""

from __future__ import annotations

from functools import cache

import torch

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
# fmt: on


def approximate_reciprocal(x: torch.Tensor) -> torch.Tensor:
    """What the GPU's instruction gives for 1/x: x fp32 of any shape, with at most 11 significant bits.

    Other values get the correctly rounded reciprocal. So do those of which it would be no normal number, which the
    instruction flushes to zero.
    """
    bits = x.view(torch.int32)
    index = (bits >> 13) & 0x3FF
    known = (bits & 0x1FFF == 0) & x.isfinite()
    off = torch.where(known, _errors(x.device)[index.long()], 0)
    return (x.reciprocal().view(torch.int32) + off).view(torch.float32)


@cache
def _errors(device: torch.device) -> torch.Tensor:
    """By mantissa, in units of the last place: [1024] int32."""
    errors = torch.zeros(1024, dtype=torch.int32)
    errors[list(TOO_LOW)] = -1
    errors[list(TOO_HIGH)] = 1
    return errors.to(device)
