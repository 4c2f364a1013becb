"""Rows that a kernel reads as they are, or as the partial sums of the product that made them.

A kernel that takes x [M, K] in bf16 or fp16 takes in its place what a product split over K hands on: P partial sums of
each row in fp32, [P * M, K], the part p of row r in row p * M + r. It adds them in the order of the parts and rounds
the sum once to the rows' dtype; from there on it is x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from normquant.kernels._device import round_to, row_offset

ROW_ALIGN = 8  # values: rows of partial sums lie a multiple of it apart, so that loads are as wide as of a plain row
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class PartialRows:
    """The partial sums [parts * m, k] of rows [m, k], which a plan takes for an x of these rows.

    dtype: of the rows, to which their sums are rounded.
    """

    m: int
    k: int
    parts: int
    dtype: torch.dtype
    device: torch.device

    @property
    def shape(self) -> tuple[int, int]:
        """Of the rows."""
        return self.m, self.k

    def stride(self, dim: int) -> int:
        """Of the rows and of the partial sums alike."""
        return (row_stride(self.k), 1)[dim]


class Partial(NamedTuple):
    """What kernels know of x's rows at compile time: how many partial sums there are of each, 0 for plain rows, and the
    dtype that their sum is rounded to."""

    parts: int
    dtype: str


WHOLE = Partial(0, "")


def partial(x: torch.Tensor | PartialRows) -> Partial:
    """The constant that stands for the rows of x."""
    return Partial(x.parts, DTYPES[x.dtype]) if isinstance(x, PartialRows) else WHOLE


def row_stride(k: int) -> int:
    """Values from one row of partial sums to the next."""
    return -(-k // ROW_ALIGN) * ROW_ALIGN


@triton.constexpr_function
def row_dtype(PARTIAL, stored):
    """The dtype of rows: that they are stored in, or that their partial sums are rounded to."""
    return tl.dtype(PARTIAL.dtype) if PARTIAL.parts else stored


@triton.jit
def load_rows(
    x_ptr, row, column, mask, m, stride_xm, PARTIAL: tl.constexpr, STRIDE_UNIT: tl.constexpr, ON_CUDA: tl.constexpr,
    EVICT_FIRST: tl.constexpr = False,
):  # fmt: skip
    # Values of rows of x as fp32, or what their partial sums stand for.
    at = x_ptr + row_offset(row, stride_xm, STRIDE_UNIT) + column
    return load_at(at, mask, row_offset(m, stride_xm, STRIDE_UNIT), PARTIAL, ON_CUDA, EVICT_FIRST).to(tl.float32)


@triton.jit
def load_at(at, mask, step, PARTIAL: tl.constexpr, ON_CUDA: tl.constexpr, EVICT_FIRST: tl.constexpr = False):
    # The same where their addresses are known, plain rows in their own dtype; step: from one partial sum of a value to
    # the next. The parts are added in order and rounded once; all of them are loaded before the first is added.
    EVICTION: tl.constexpr = "evict_first" if EVICT_FIRST else ""  # in here: Triton 3.6 takes no string as a default
    PARTS: tl.constexpr = PARTIAL.parts
    if PARTS == 0:
        x = tl.load(at, mask=mask, other=0.0, eviction_policy=EVICTION)
    else:
        parts = ()
        for part in tl.static_range(PARTS):
            parts += (tl.load(at + part * step, mask=mask, other=0.0, eviction_policy=EVICTION),)
        x = parts[0]
        for part in tl.static_range(1, PARTS):
            x += parts[part]
        x = round_to(x, row_dtype(PARTIAL, None), ON_CUDA)
    return x
