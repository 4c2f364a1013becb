"""What people write around a norm and a quantization that is no plain norm -> quantization: in place, through views,
twice, in other shapes. Whatever the pass makes of it, values, strides and inputs are those of eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from shared.pass_harness import assert_same, exact, run_with_pass
from torch.utils._pytree import tree_leaves

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
M, K = 6, 256
X, R, W = exact(M, K), exact(M, K, seed=2), exact(K, seed=1) + 0.5

Case = tuple[Callable[..., Any], tuple[torch.Tensor, ...], bool]
CASES: dict[str, Case] = {}


def case(*inputs: torch.Tensor, dynamic: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(fn: Callable[..., Any]) -> Callable[..., Any]:
        CASES[fn.__name__] = fn, inputs, dynamic
        return fn

    return add


def norm(x: torch.Tensor, w: torch.Tensor, eps: float | None = 1e-6) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), w, eps)


def quant(y: torch.Tensor, group: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    groups = y.float().unflatten(-1, (-1, group))
    scale = groups.abs().amax(-1).clamp(min=1e-10) / 448
    return (groups / scale.unsqueeze(-1)).clamp(-448, 448).to(FP8).flatten(-2), scale


def values(rows: float) -> torch.Tensor:
    return torch.full((M, K), rows, dtype=BF16)


# In place


@case(X, W)
def the_norm_is_written_before_it_is_quantized(x, w):
    return quant(norm(x, w).mul_(2.0))


@case(X, W)
def the_norm_is_written_after_it_was_quantized(x, w):
    y = norm(x, w)
    q = quant(y)
    y.add_(1)
    return q, y


@case(X, W)
def a_copy_of_x_is_written_after_the_norm(x, w):
    x = x.clone()
    y = norm(x, w)
    x.zero_()
    return quant(y), x


@case(X, W)
def the_input_is_written_between_two_norms(x, w):
    q = quant(norm(x, w))
    x.mul_(2)
    return q, quant(norm(x, w))


@case(X, W)
def the_weight_is_written_between_two_norms(x, w):
    y = norm(x, w)
    w.add_(1)
    return quant(y), quant(norm(x, w))


@case(X, W)
def a_view_of_the_data_is_written(x, w):
    q, s = quant(norm(x, w))
    v = q.view(torch.uint8)
    v[0] = 0
    return q, v, s


@case(X, W)
def the_scale_is_written(x, w):
    q, s = quant(norm(x, w))
    s[:, 0] = 1.0
    return q, s


@case(X, W)
def the_data_is_written_into_a_buffer(x, w):
    buffer = torch.zeros(2 * M, K, dtype=FP8)
    q, s = quant(norm(x, w))
    buffer[:M] = q
    return buffer, s


@case(X, R, W)
def the_residual_is_added_in_place(x, r, w):
    r.add_(x)
    return quant(norm(r, w))


@case(X, R, W)
def the_sum_is_written_later(x, r, w):
    h = x + r
    q = quant(norm(h, w))
    h.mul_(2)
    return q, h


# Addends


@case(X, R.t().contiguous().t(), W)
def the_residual_is_by_column(x, r, w):
    h = x + r
    return quant(norm(h, w)), h


@case(X, exact(1, K, seed=3).expand(M, K), W)
def the_residual_is_one_row_expanded(x, r, w):
    h = x + r
    return quant(norm(h, w)), h


@case(X, exact(K, seed=3), W)
def the_residual_is_broadcast(x, r, w):
    h = x + r
    return quant(norm(h, w)), h


@case(X, W)
def x_is_its_own_residual(x, w):
    h = x + x
    return quant(norm(h, w)), h


@case(X, R, W)
def the_residual_is_scaled_by_add(x, r, w):
    h = torch.add(x, r, alpha=2)
    return quant(norm(h, w)), h


@case(X, R, W)
def the_residual_is_subtracted(x, r, w):
    h = x - r
    return quant(norm(h, w)), h


@case(X, R, W)
def the_sum_is_written_down_in_both_orders(x, r, w):
    return quant(norm(x + r, w)), quant(norm(r + x, w)), x + r


@case(X, R, W)
def two_norms_share_a_weight(x, r, w):
    return quant(norm(x, w)), quant(norm(x + r, w))


# Shapes and dtypes


@case(exact(0, K), W, dynamic=True)
def no_rows(x, w):
    return quant(norm(x, w))


@case(exact(1, K), W, dynamic=True)
def one_row(x, w):
    return quant(norm(x, w))


@case(exact(1, 1, K), W)
def one_token(x, w):
    return quant(norm(x, w))


@case(X, W, dynamic=True)
def symbolic_sizes(x, w):
    return quant(norm(x, w))


@case(exact(M, 96), exact(96, seed=1))
def narrow_groups(x, w):
    return quant(norm(x, w), 32)


@case(torch.randn(M, 2 * K, generator=torch.Generator().manual_seed(0)).to(BF16)[:, ::2], W)
def every_other_column(x, w):
    return quant(norm(x, w))


@case(exact(M, K, dtype=torch.float16), exact(K, seed=1, dtype=torch.float16) + 0.5)
def half_precision(x, w):
    return quant(norm(x, w))


@case(X.double(), W.double())
def double_precision(x, w):
    return quant(norm(x, w).to(BF16))


@case(X, W)
def autocast(x, w):
    with torch.autocast("cpu", dtype=BF16):
        return quant(norm(x, w))


@case(exact(3, M, K), W)
def mapped_over_a_batch(x, w):
    return torch.func.vmap(lambda a: quant(norm(a, w)))(x)


# Values


@case(values(float("nan")), W)
def nan(x, w):
    return quant(norm(x, w))


@case(values(3e38), W)
def squares_that_overflow(x, w):
    return quant(norm(x, w))


@case(values(0.0), W)
def zeros(x, w):
    return quant(norm(x, w))


@case(X, W)
def eps_is_zero(x, w):
    return quant(norm(x, w, 0.0))


@case(X, W)
def eps_is_left_to_torch(x, w):
    return quant(norm(x, w, None))


@case(X, W)
def eps_is_negative(x, w):
    return quant(norm(x, w, -1e-6))


@case(X, W)
def eps_is_infinite(x, w):
    return quant(norm(x, w, float("inf")))


# What is read, and how often


@case(X, W)
def a_norm_of_a_norm(x, w):
    return quant(norm(norm(x, w), w))


@case(X, W)
def a_norm_of_what_was_quantized(x, w):
    q, s = quant(norm(x, w))
    y = (q.float().unflatten(-1, (-1, 128)) * s.unsqueeze(-1)).flatten(-2).to(BF16)
    return quant(norm(y, w))


@case(X, W)
def three_widths_of_groups(x, w):
    y = norm(x, w)
    return quant(y), quant(y, 64), quant(y, 32)


@case(X, W)
def parts_of_the_norm(x, w):
    y = norm(x, w)
    return quant(y[:, :128]), quant(y[2:])


@case(X, W)
def the_norm_twice_in_a_tensor(x, w):
    y = norm(x, w)
    return quant(torch.cat([y, y], 0)), quant(torch.cat([y, y], 1))


@case(X, W)
def columns_in_reverse(x, w):
    return quant(norm(x, w).flip(1))


@case(X, W)
def rows_moved(x, w):
    return quant(norm(x, w).roll(1, 0))


@case(exact(4, 8, K), W)
def tokens_transposed_behind_the_norm(x, w):
    return quant(norm(x, w).transpose(0, 1))


@case(exact(4, 8, K), W)
def tokens_transposed_ahead_of_the_norm(x, w):
    return quant(norm(x.transpose(0, 1), w))


@case(X, W)
def the_amax_is_of_another_tensor(x, w):
    other = (norm(x, w) * 2).float().unflatten(-1, (-1, 128))
    scale = other.abs().amax(-1).clamp(min=1e-10) / 448
    return (norm(x, w).float().unflatten(-1, (-1, 128)) / scale.unsqueeze(-1)).to(FP8).flatten(-2), scale


@case(X, W)
def the_norm_is_read_with_strides_of_its_own(x, w):
    y = norm(x, w)
    return quant(y), y.as_strided((3, 4), (1, 7), 5)


@case(X, W)
def the_norm_is_detached(x, w):
    return quant(norm(x, w).detach())


@case(X, W)
def a_branch_quantizes(x, w):
    return torch.cond(x.float().sum() > 0, quant, lambda y: quant(y * 1), (norm(x, w),))


@pytest.mark.parametrize("name", CASES)
def test_what_is_left_is_eager(name: str) -> None:
    fn, inputs, dynamic = CASES[name]
    eager, given = ([t.clone(memory_format=torch.preserve_format) for t in inputs] for _ in range(2))
    with torch.no_grad():
        expected = tree_leaves(fn(*eager))
        out = run_with_pass(fn, *given, dynamic=dynamic or None, strict=False)
    found = tree_leaves(out.result)
    assert [report.error for report in out.reports if report.error] == []
    assert_same(found, expected)
    assert_same(given, eager)
    assert [t.stride() for t in found if t.numel()] == [t.stride() for t in expected if t.numel()]
