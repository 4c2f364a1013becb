"""What the pass accepts is what the op accepts: layouts and widths that an op refuses leave the graph as it was."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from shared import latent_graphs, traced_graphs, vllm_ops
from shared.pass_harness import assert_same, exact, run_with_pass

import normquant as nq
from normquant.compile import clear, explain, inductor_options, last_report
from normquant.compile.fusions import latent_norm_quant
from normquant.kernels.tiling import MAX_ROW

BF16 = torch.bfloat16
M, K = 6, 256


def norm(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(h, w.shape, w, 1e-6)


def quant(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    q = nq.group_quant(y)
    return q.data, q.scale


def decomposed(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A quantization that takes any layout."""
    g = y.reshape(y.shape[0], -1, 128).float()
    s = g.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0
    return (g / s).clamp(-448, 448).to(torch.float8_e4m3fn).view(y.shape), s.squeeze(-1)


def hf_norm(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    wide = h.float()
    return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(BF16)


def compiled(fn, *args):
    """The report of fn's graph, compiled by Inductor with every site fused, after checking what it returns."""
    torch._dynamo.reset()
    clear()
    with torch.no_grad(), torch._inductor.config.patch(emulate_precision_casts=True, force_disable_caches=True):
        assert_same(torch.compile(fn, options=inductor_options("always"))(*args), fn(*args))
    report = last_report()
    assert report is not None and report.error == "", explain()
    return report


def test_a_convolution_beside_the_residual() -> None:
    """Its result is [..., K] with the rows side by side, which the op with a residual does not read."""
    conv = torch.nn.Conv1d(K, K, 3, padding=1, groups=K, dtype=BF16)
    weight = exact(K, seed=1) + 0.5

    def fn(x):
        h = x + conv(x.transpose(1, 2)).transpose(1, 2)
        return *quant(norm(h, weight)), h

    (site,) = compiled(fn, exact(1, 24, K))
    assert site.op == "rms_norm_quant", "the sum is made in front of the op"


@pytest.mark.parametrize(
    ("column", "words"),
    [(lambda w: w[:, 0], "weight has stride"), (lambda w: w[:1, 0].expand(K), "weight has shape (1,)")],
    ids=["a column", "expanded"],
)
def test_a_weight_that_the_op_does_not_read(column, words) -> None:
    (site,) = compiled(lambda x, w: quant(norm(x, column(w))), exact(M, K), exact(K, 2, seed=1) + 0.5)
    assert not site.fused and words in site.reason


def test_a_norm_of_parts_of_the_rows_that_are_quantized() -> None:
    def fn(x, w):
        y = torch.ops.vllm_ir.rms_norm(x.view(M, 4, 128), w, 1e-6).view(M, 512)
        return vllm_ops.per_token_group_fp8_quant(y)

    (site,) = run_with_pass(fn, exact(M, 512), exact(128, seed=1) + 0.5).sites
    assert not site.fused and "rows of 512 values, the norm makes rows of 128" in site.reason
    assert site.k == 128


LAYOUTS = {
    "rows": lambda x: x,
    "rows far apart": lambda x: torch.cat([x, x], 1)[:, :K],
    "side by side": lambda x: x.t().contiguous().t(),
    "every other value": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "one row": lambda x: x[:1].expand(M, K),
}


@pytest.mark.parametrize("residual", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_unrounded_sum_is_fused_where_the_op_takes_both_addends(layout: str, residual: str) -> None:
    x, r, w = LAYOUTS[layout](exact(M, K)), LAYOUTS[residual](exact(M, K, seed=1)), exact(K, seed=2) + 0.5

    def fn(x, r, w):
        h = x.float() + r.float()
        return decomposed((h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * w).to(BF16))

    try:
        nq.add_rms_norm_quant(x, r, w)
        accepted = True
    except ValueError:
        accepted = False
    outcome = run_with_pass(fn, x, r, w)
    assert outcome.site.fused == accepted, outcome.site
    assert accepted or "the last stride must be 1" in outcome.site.reason
    assert_same(outcome.result, fn(x, r, w))


@pytest.mark.parametrize("residual", LAYOUTS)
def test_a_rounded_sum_goes_into_the_op_where_it_takes_both_addends(residual: str) -> None:
    x, r, w = exact(M, K), LAYOUTS[residual](exact(M, K, seed=1)), exact(K, seed=2) + 0.5

    def fn(x, r, w):
        h = x + r
        return quant(norm(h, w)), h

    outcome = run_with_pass(fn, x, r, w)
    assert outcome.site.op == ("add_rms_norm_quant" if r.stride(-1) == 1 else "rms_norm_quant")
    assert_same(outcome.result, fn(x, r, w))


@pytest.mark.parametrize("over", [0, 128])
def test_the_longest_row(over: int) -> None:
    x, w = exact(2, MAX_ROW + over), exact(MAX_ROW + over, seed=1) + 0.5
    site = run_with_pass(lambda x, w: quant(hf_norm(x, w)), x, w).site
    assert site.fused != bool(over)
    if over:
        words = "K is 65664; the norm kernels hold a row in registers and take at most 65536"
        assert words in site.reason
        with pytest.raises(ValueError, match=words):
            nq.rms_norm_quant(x, w)


@pytest.mark.parametrize(
    ("at", "apart", "words"),
    [
        (0, lambda x: x.t().contiguous().t(), "x has stride (1, 5); the last stride must be 1"),
        (1, lambda w: w.repeat_interleave(2)[::2], "q_weight has stride (2,); it must be contiguous"),
        (2, lambda w: w.repeat_interleave(2)[::2], "kv_weight has stride (2,); it must be contiguous"),
        (3, lambda cache: cache.t().contiguous().t(), "cos is (16, 64) bfloat16; accepted: [positions, 32 or more]"),
        (4, lambda positions: positions.repeat_interleave(2)[::2], "accepted: [5] int32 or int64, contiguous"),
    ],
    ids=["x", "q_weight", "kv_weight", "cache", "positions"],
)
def test_latents_with_gaps_between_their_values(at: int, apart, words: str) -> None:
    x, *weights, cache, positions = (apart(t) if i == at else t for i, t in enumerate(latent_graphs.inputs()))

    def fn(x, positions):
        return latent_graphs.latents()(x, *weights, cache, positions)

    def fuse(graph):
        return traced_graphs.rewrite(graph, latent_norm_quant.find)

    result, (site,), left = traced_graphs.run(fuse, fn, x, positions)
    assert "latent_norm_quant does not accept this: " in site.reason and words in site.reason, site.reason
    assert [name for name in left if name.startswith("normquant.")] == []
    assert_same(result, fn(x, positions))
