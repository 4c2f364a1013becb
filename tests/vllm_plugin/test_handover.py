"""A form left with a tensor: who gets it, and everything that makes it stale."""

from __future__ import annotations

import gc
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from shared.vllm_modules import values

from normquant import ops
from normquant.spec import QuantizedActivation, QuantSpec
from normquant.specs import FLASHINFER_LINEAR, VLLM, VLLM_UE8M0
from normquant.vllm.handover import MARK, carrying, differing, differing_but_nan, drop, fits, in_spec, leave, take
from normquant.vllm.linear_inputs import block_scale

M, K = 4, 256


def left(spec: QuantSpec = VLLM, m: int = M) -> tuple[torch.Tensor, QuantizedActivation]:
    """A tensor as a norm returns it in inference mode, and the form that it carries."""
    with carrying():
        y = values(m, K) + 0
    form = ops.group_quant(y, spec=spec)
    assert leave(y, form)
    return y, form


@pytest.fixture(autouse=True)
def inference():  # as vLLM runs its models
    with torch.inference_mode():
        yield


def test_the_tensor_itself_and_views_of_all_of_it_get_the_form() -> None:
    y, form = left()
    for x in (y, y.view(-1, K), y[:], y.view(2, 2, K).view(-1, K), y.reshape(M, K), y.view(2, 2, K)):
        assert take(x, VLLM) is form


def test_parts_copies_and_other_tensors_do_not() -> None:
    y, _ = left()
    others = y[:2], y[1:], y[:, :128], y.clone(), y.t(), y.view(2 * M, K // 2), y + 0, y.view(torch.float16), y.detach()
    assert [take(x, VLLM) for x in others] == [None] * len(others)


WRITES: dict[str, Callable[[torch.Tensor], object]] = {
    "in place": lambda y: y.mul_(2),
    "into a row": lambda y: y[1].fill_(0),
    "into a view": lambda y: y.view(-1).add_(1),
    "as out=": lambda y: torch.add(y, 1, out=y),
    "by copy_": lambda y: y.copy_(torch.zeros_like(y)),
    "by an index": lambda y: y.index_fill_(0, torch.tensor([0]), 1.0),
    "through detach": lambda y: y.detach().zero_(),
    "by set_": lambda y: y.set_(torch.zeros_like(y)),
    "by foreach": lambda y: torch._foreach_mul_([y], 2.0),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_write_makes_it_stale(write: str) -> None:
    y, _ = left()
    views = y.view(-1, K), y
    WRITES[write](y)
    assert [take(x, VLLM) for x in views] == [None, None]


def test_a_tensor_put_in_its_place_is_another() -> None:
    y, _ = left()
    y.data = torch.zeros_like(y)
    assert take(y, VLLM) is None


def test_memory_that_is_used_again_has_no_form() -> None:
    y, _ = left()
    storage, place = y.untyped_storage(), (0, (M, K), (K, 1))
    del y
    gc.collect()
    with carrying():
        again = torch.empty(0, dtype=torch.bfloat16).set_(storage, *place)
    assert take(again, VLLM) is None


def test_a_mark_that_was_copied_to_another_tensor_does_not_count() -> None:
    y, _ = left()
    other = y.clone()
    setattr(other, MARK, getattr(y, MARK))
    assert take(other, VLLM) is None


def test_tensors_of_inference_mode_carry_nothing() -> None:
    y = values(M, K) + 0
    assert y.is_inference() and not leave(y, ops.group_quant(y)) and take(y, VLLM) is None


def test_what_is_dropped_is_gone() -> None:
    y, _ = left()
    drop(y)
    drop(y)
    assert take(y, VLLM) is None


@pytest.mark.parametrize("layout", ["row", "col", "col_tma"])
@pytest.mark.parametrize("wanted", ["row", "col", "col_tma"])
@pytest.mark.parametrize("spec", [VLLM, VLLM_UE8M0])
def test_scales_are_laid_out_as_the_reader_takes_them(spec: QuantSpec, layout: str, wanted: str) -> None:
    y, _ = left(spec.replace(layout=layout), m=5)
    target = spec.replace(layout=wanted, rounding="once", sum="rounded")  # of the norm, which is done
    given, expected = take(y, target), ops.group_quant(y, spec=target)
    assert given is not None and given.scale.stride() == expected.scale.stride()
    assert differing(given.scale, expected.scale) == differing(given.data, expected.data) == 0


def test_another_rule_is_no_hit() -> None:
    y, form = left(VLLM)
    for spec in (VLLM_UE8M0, FLASHINFER_LINEAR, VLLM.replace(group=64), VLLM.replace(floor=1e-4)):
        assert take(y, spec) is None and in_spec(form, spec) is None


def test_a_rule_for_few_rows_fits_by_the_rows_that_there_are() -> None:
    linear = VLLM_UE8M0.replace(layout="col_tma", few_rows=32)
    assert not fits(linear, VLLM_UE8M0, 31) and fits(linear, VLLM_UE8M0, 32)
    assert fits(linear, FLASHINFER_LINEAR, 31) and not fits(linear, FLASHINFER_LINEAR, 32)
    assert take(left(linear, m=31)[0], VLLM_UE8M0) is None and take(left(linear, m=32)[0], VLLM_UE8M0) is not None


def test_packed_scales_are_not_taken_apart() -> None:
    packed = VLLM_UE8M0.replace(scale="ue8m0_packed", layout="col_tma")
    assert fits(packed, packed, 8) and not fits(packed, VLLM_UE8M0, 8)


def test_differences_are_counted() -> None:
    a = torch.tensor([1.0, float("nan"), 2.0])
    assert differing(a, a.clone()) == 0 and differing(a, torch.tensor([1.0, 3.0, 4.0])) == 2
    assert differing(a, a[:2]) == 3


def test_a_nan_that_vllm_clamps_is_no_difference() -> None:
    ours, clamped, other = (torch.tensor([1.0, x, 3.0]).to(torch.float8_e4m3fn) for x in (torch.nan, -448.0, 2.0))
    assert differing_but_nan(ours, clamped) == differing_but_nan(ours, ours) == 0
    assert differing_but_nan(ours, other) == differing_but_nan(clamped, ours) == 1
    assert differing_but_nan(ours.float(), clamped.float()) == 1  # nothing was quantized there
    assert differing_but_nan(ours, clamped[:2]) == 3


def test_the_scale_of_a_weight_has_either_name() -> None:
    one, other = (
        SimpleNamespace(weight_scale_inv=1, weight_scale=None),
        SimpleNamespace(weight_scale_inv=None, weight_scale=2),
    )
    assert (block_scale(one), block_scale(other)) == (1, 2)
