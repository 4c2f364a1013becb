"""The graphs that Inductor nests reductions in, where they quantize to fp8: fused, or left whole with the reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from shared.pass_harness import Outcome, assert_same, exact, run_with_pass

M, K, GROUP = 128, 512, 128
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
X, R, W = exact(M, K), exact(M, K, seed=1), exact(K, seed=2) + 0.5


def check(fn: Callable, *args: torch.Tensor) -> Outcome:
    """The outcome, after checking that it is what eager gives, for the arguments as well."""
    eager, compiled = ([t.clone() for t in args] for _ in range(2))
    expected = fn(*eager)
    outcome = run_with_pass(fn, *compiled)
    assert_same(outcome.result, expected)
    assert_same(compiled, eager)
    return outcome


def norm(x, w):
    return F.rms_norm(x, (x.shape[-1],), w, 1e-6)


def quant(y, group=GROUP, least=1e-12):
    """Read back as float32, as the graphs do."""
    g = y.view(y.shape[0], -1, group)
    s = (g.float().abs().amax(-1) / 448.0).clamp(min=least)
    return (g / s.unsqueeze(-1)).to(FP8).view(y.shape).float(), s


def residual(x, r, w):
    h = x.float() + r.float()
    y = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(BF16) * w
    return quant(y.view(M, K), least=1 / (448.0 * 512))


def swizzled(s):
    """Tiles of 128 rows by 4 groups, as block-scaled tensor cores read their scales."""
    m, g = s.shape
    tiles = s.view(m // 128, 128, g // 4, 4).permute(0, 2, 1, 3)
    return tiles.reshape(-1, 4, 32, 4).transpose(1, 2).reshape(m, g)


@pytest.mark.parametrize("group", [128, 64, 32])
@pytest.mark.parametrize("m", [1, 3, M])
def test_norm_and_quantization(m: int, group: int) -> None:
    assert check(lambda x, w: quant(norm(x, w), group), X[:m], W).ops() == ["normquant.rms_norm_quant.default"]


@pytest.mark.parametrize("shape", [(K,), (1, K), (1, 1, K)], ids=str)
def test_residual_norm_and_quantization(shape: tuple[int, ...]) -> None:
    assert check(residual, X, R, W.view(shape)).ops() == ["normquant.add_rms_norm_quant.default"]


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (M, 1), (M, K), (1, M, 1), (1, M, K)], ids=str)
def test_a_weight_that_is_not_one_value_a_column(shape: tuple[int, ...]) -> None:
    outcome = check(residual, X, R, exact(*shape, seed=3) + 0.5)
    assert outcome.ops() == [] and "the weight has shape" in outcome.site.reason


def test_scales_that_are_swizzled_afterwards() -> None:
    def fn(x, w):
        data, s = quant(norm(x, w))
        return data, swizzled(s)

    assert check(fn, X, W).ops() == ["normquant.rms_norm_quant.default"]


def test_a_shifted_norm_read_beside_its_quantization() -> None:
    def fn(x, w):
        y = norm(x, w)
        return quant(y), torch.roll(y, 1, -1)

    assert check(fn, X, W).ops() == ["normquant.rms_norm_quant_with_norm.default"]


def test_an_input_that_is_changed_afterwards() -> None:
    def fn(x, w):
        result = quant(norm(x, w))
        x.add_(3.0)
        return result, x

    assert check(fn, X, W).ops() == ["normquant.rms_norm_quant.default"]


def test_symbolic_rows_and_columns() -> None:
    for dim, words in ((0, ""), (1, "the group is")):
        x, w = X.clone(), W.clone()
        torch._dynamo.mark_dynamic(x, dim)
        if dim == 1:
            torch._dynamo.mark_dynamic(w, 0)
        outcome = run_with_pass(lambda x, w: quant(norm(x, w)), x, w)
        assert_same(outcome.result, quant(norm(x, w)))
        assert outcome.site.fused == (dim == 0) and words in outcome.site.reason


def no_weight(x, w):
    h = x.float()
    return (h / torch.sqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(BF16)


def shifted_scales(x, w):
    g = norm(x, w).view(M, -1, GROUP)
    s = (g.float().abs().amax(-1) / 448.0).clamp(min=1e-12)
    return (g / torch.roll(s, 1, -1).unsqueeze(-1)).clamp(-448, 448).to(FP8), s


def rows_in_pieces(x, w):
    """The scales of rows 0, 32, 64, 96, 1, 33, ..."""
    g = norm(x, w).view(4, M // 4, -1, GROUP).transpose(0, 1)
    s = (g.float().abs().amax(-1, keepdim=True) / 448.0).clamp(min=1e-12)  # [M / 4, 4, K / GROUP, 1]
    return (g / s).transpose(0, 1).reshape(M, K).clamp(-448, 448).to(FP8), s.view(M, -1)


REJECTED = {
    "rows in pieces": (rows_in_pieces, "the scales are neither in the order of the rows nor in that of the groups"),
    "group 16": (lambda x, w: quant(norm(x, w), 16), "group is 16"),
    "whole rows": (lambda x, w: quant(norm(x, w), K), "group is 512"),
    "square root": (lambda x, w: quant(no_weight(x, w)), "the norm divides by a square root"),
    "something in between": (lambda x, w: quant(norm(x, w) + 1), "its input is aten.add, not an RMSNorm"),
    "shifted in between": (lambda x, w: quant(torch.roll(norm(x, w), 1, -1)), "not an RMSNorm"),
    "shifted scales": (shifted_scales, "its scale comes from aten.index (index); expected the amax of each group"),
    "float32": (lambda x, w: quant(norm(x.float() * 0.5, w.float())), "reads float32"),
    "columns far apart": (
        lambda x, w: quant(norm(x[:, ::2], w[::2])),
        "x has stride (512, 2); the last stride must be 1",
    ),
}


@pytest.mark.parametrize("name", REJECTED)
def test_what_the_kernels_lack_stays(name: str) -> None:
    fn, words = REJECTED[name]
    outcome = check(fn, X, W)
    (report,) = outcome.reports
    (site,) = (*report.sites, *report.others)
    assert outcome.ops() == [] and words in site.reason, site
