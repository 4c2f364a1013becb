"""The quantized form of a norm's result, left with the tensor itself for whoever quantizes that tensor.

    leave(y, form)      by the norm, whose kernel made both
    take(x, spec)       by what would quantize x: the form, where x is y as it was left, and the spec is the form's

A form that does not belong to what x holds would be a wrong answer, so a hit asks for all of this:

- x is the very object that the norm returned, or a view of all of it. Memory that is used again makes another object.
- No operation of torch wrote y or a view of it since: its version counter stands still. Tensors of inference mode have
  none and carry nothing, so norms make theirs outside of it (`carrying`).
- y lies where it lay, in the same shape.

What no version counter shows, a kernel that writes through a pointer, is the business of those who call `leave`: they
have to know what runs between norm and reader (`first_forward`, or a compiler's graph). Within a captured CUDA graph
all of this is decided once, while it is captured, for kernels that run in that order ever after.
"""

from __future__ import annotations

import weakref
from functools import cache
from typing import Any, NamedTuple

import torch

from normquant.reference import lay_out_scale
from normquant.spec import FP8_MAX, QuantizedActivation, QuantSpec

MARK = "_normquant_form"
SAME, LAID_OUT_OTHERWISE, UNLIKE = "same", "laid out otherwise", "unlike"


class _Left(NamedTuple):
    """A form, and the tensor as it was when the form was left there."""

    form: QuantizedActivation
    owner: weakref.ref[torch.Tensor]
    version: int
    place: tuple[int, ...]


class carrying:
    """Tensors made within can carry a form, also where inference mode is on outside, and none has a gradient.

    Entered for every norm, so it is no generator, and calls what `inference_mode(False)` and `no_grad()` call: those
    take the host as long as making the tensors. The guard, once left, puts both modes back.
    """

    __slots__ = ("_guard",)

    def __enter__(self) -> None:
        self._guard = torch._C._InferenceMode(False)
        self._guard.__enter__()
        torch._C._set_grad_enabled(False)

    def __exit__(self, *exception: Any) -> None:
        self._guard.__exit__(None, None, None)


def leave(y: torch.Tensor, form: QuantizedActivation) -> bool:
    """Leave y's quantized form [M, K] with y [M, K], contiguous. False where y cannot carry one."""
    if y.is_inference() or not y.is_contiguous():
        return False
    setattr(y, MARK, _Left(form, weakref.ref(y), y._version, _place(y)))
    return True


def drop(y: torch.Tensor) -> None:
    """Take back what was left with y."""
    if hasattr(y, MARK):
        delattr(y, MARK)


def take(x: torch.Tensor, spec: QuantSpec) -> QuantizedActivation | None:
    """x [..., K] quantized by `spec`, as [M, K], where that was left with it; None where x is to be quantized."""
    y = x if hasattr(x, MARK) else x._base
    left: _Left | None = getattr(y, MARK, None)
    if y is None or left is None or left.owner() is not y or y._version != left.version:
        return None
    if not x.is_contiguous() or _place(x) != left.place:
        return None
    return in_spec(left.form, spec)


def in_spec(form: QuantizedActivation, spec: QuantSpec) -> QuantizedActivation | None:
    """A form [M, K] as another spec has it: itself, or with its scales laid out anew; None where the values differ."""
    m, k = form.data.shape
    likeness = _likeness_at(form.spec, spec, m)
    if likeness != LAID_OUT_OTHERWISE:
        return form if likeness == SAME else None
    return QuantizedActivation(form.data, lay_out_scale(form.scale, k, spec.at(m)), spec)


def fits(made: QuantSpec, wanted: QuantSpec, m: int) -> bool:
    """Whether m rows quantized by one spec have the values and scales of another; the scales may lie otherwise."""
    return _likeness_at(made, wanted, m) != UNLIKE


def _likeness_at(made: QuantSpec, wanted: QuantSpec, m: int) -> str:
    return _likeness(made, m < made.few_rows, wanted, m < wanted.few_rows)


@cache
def _likeness(made: QuantSpec, by_few: bool, wanted: QuantSpec, wanted_by_few: bool) -> str:
    """How a rounded norm quantized by one spec compares to one by another, each by its rule for few rows or for many:
    what they say of the norm plays no part."""
    rules = made.at(0 if by_few else made.few_rows), wanted.at(0 if wanted_by_few else wanted.few_rows)
    one, other = (rule.replace(rounding="twice", sum="fp32") for rule in rules)
    if one == other:
        return SAME
    if one.scale != "ue8m0_packed" and one.replace(layout=other.layout) == other:
        return LAID_OUT_OTHERWISE
    return UNLIKE


def differing(given: torch.Tensor, expected: torch.Tensor) -> int:
    """In how many values two tensors of one dtype differ, NaNs counted as equal; waits for the GPU.

    Tensors of unlike shapes differ in all.
    """
    if given.shape != expected.shape:
        return max(given.numel(), expected.numel())
    if given.dtype == torch.float8_e4m3fn:
        given, expected = given.float(), expected.float()
    unlike: Any = (given != expected) & ~(given.isnan() & expected.isnan())
    return int(unlike.sum())


def differing_but_nan(ours: torch.Tensor, theirs: torch.Tensor) -> int:
    """As `differing`, of our tensor and vLLM's, whose clamp makes -448 of a NaN that it quantizes (`normquant.specs`):
    of fp8 values that is no difference."""
    if ours.dtype == torch.float8_e4m3fn and ours.shape == theirs.shape:
        ours, theirs = ours.float(), theirs.float()
        theirs = theirs.masked_fill(ours.isnan() & (theirs == -FP8_MAX), torch.nan)
    return differing(ours, theirs)


def _place(x: torch.Tensor) -> tuple[int, ...]:
    return x.data_ptr(), x.numel(), x.shape[-1]
