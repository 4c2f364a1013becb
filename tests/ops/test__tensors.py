"""Bad inputs: each is refused with one sentence of what was given and what is accepted, in every mode of torch."""

import contextlib

import pytest
import torch
from shared.inputs import activations, weights
from torch._subclasses.fake_tensor import FakeTensorMode

import normquant as nq
from normquant import QuantSpec
from normquant.ops import latent_norm_quant, silu_mul_quant
from normquant.ops._tensors import (
    check_angles,
    check_eps,
    check_normed_width,
    check_weight_offset,
    fake_quant,
    rows,
    shapes,
)

M, K = 5, 384
Q, C, R = 256, 128, 32


def x(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> torch.Tensor:
    return torch.ones(shape or (M, K), dtype=dtype, device=device)


def w(k: int = K, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> torch.Tensor:
    return torch.ones(k, dtype=dtype, device=device)


def angles(rows: int = M, columns: int = R // 2, **kwargs) -> torch.Tensor:
    return torch.ones(rows, columns, **kwargs)


def latent(activation=None, q=None, c=None, cos=None, sin=None, positions=None, **kwargs):
    """latent_norm_quant with good arguments for those that are left out; tensors are made by functions, see `CASES`."""
    one = lambda given, default: default if given is None else given  # noqa: E731
    return latent_norm_quant(
        one(activation, x(M, Q + C + R)), one(q, w(Q)), one(c, w(C)), one(cos, angles()), one(sin, angles()), positions,
        **kwargs,
    )  # fmt: skip


# what is wrong -> a call, what was given, what is accepted (both as in the message)
CASES = {
    "fp32 x": (lambda: nq.rms_norm_quant(x(dtype=torch.float32), w()), "float32", "bfloat16, float16"),
    "integer x": (lambda: nq.group_quant(x(dtype=torch.int16)), "int16", "bfloat16, float16"),
    "0-dimensional x": (lambda: nq.group_quant(torch.ones((), dtype=torch.bfloat16)), "0-dimensional", "[..., K]"),
    "K of a group and a half": (lambda: nq.group_quant(x(M, 192)), "K = 192", "multiple of the group, 128"),
    "K below a group": (lambda: nq.group_quant(x(M, 32), spec=QuantSpec(group=64)), "K = 32", "group, 64"),
    "K = 0": (lambda: nq.group_quant(x(M, 0)), "K = 0", "positive multiple of the group, 128"),
    "K = 0 of a norm": (lambda: nq.rms_norm_quant(x(2, 3, 0), w(0)), "K = 0", "positive multiple"),
    "columns apart": (lambda: nq.group_quant(x(M, 2 * K)[:, ::2]), "(768, 2)", "last stride must be 1"),
    "columns apart in 1-D": (lambda: nq.group_quant(x(2 * K)[::2]), ", 2)", "last stride must be 1"),
    "transposed x": (lambda: nq.rms_norm_quant(x(K, M).t(), w()), "(1, 5)", "last stride must be 1"),
    "uneven rows": (lambda: nq.group_quant(x(3, 4, K)[:, :3]), "(3, 3, 384)", ".contiguous()"),
    "uneven residual": (lambda: nq.add_rms_norm_quant(x(3, 3, K), x(3, 4, K)[:, :3], w()), "residual", ".contiguous()"),
    "short weight": (lambda: nq.rms_norm_quant(x(), w(K - 1)), "(383,)", "[K] = [384]"),
    "2-D weight": (lambda: nq.rms_norm_quant(x(), x(1, K)), "(1, 384)", "[K] = [384]"),
    "0-dimensional weight": (lambda: nq.rms_norm_quant(x(), torch.ones(())), "()", "[K] = [384]"),
    "fp64 weight": (lambda: nq.rms_norm_quant(x(), w(dtype=torch.float64)), "float64", "bfloat16, float16, float32"),
    "weight apart": (lambda: nq.rms_norm_quant(x(), w(2 * K)[::2]), "(2,)", "contiguous"),
    "weight elsewhere": (lambda: nq.rms_norm_quant(x(), w(device="meta")), "meta", "one device"),
    "x elsewhere": (lambda: nq.rms_norm_quant(x(device="meta"), w()), "cpu", "one device"),
    "residual elsewhere": (lambda: nq.add_rms_norm_quant(x(), x(device="meta"), w()), "meta", "one device"),
    "residual of other shape": (lambda: nq.add_rms_norm_quant(x(), x(1, K), w()), "(1, 384)", "(5, 384)"),
    "residual of other dtype": (lambda: nq.add_rms_norm_quant(x(), x(dtype=torch.float16), w()), "float16", "bfloat16"),
    "residual columns apart": (lambda: nq.add_rms_norm_quant(x(), x(M, 2 * K)[:, ::2], w()), "residual", "last stride"),
    "eps = -1": (lambda: nq.rms_norm_quant(x(), w(), -1.0), "eps is -1.0", "positive"),
    "eps = 0": (lambda: nq.rms_norm_quant(x(), w(), 0.0), "eps is 0.0", "positive"),
    "eps = 0 as an integer": (lambda: nq.rms_norm_quant(x(), w(), 0), "eps is 0", "positive"),
    "eps below fp32": (lambda: nq.rms_norm_quant(x(), w(), 1e-50), "eps is 1e-50", "positive normal fp32"),
    "eps of a sum": (lambda: nq.add_rms_norm_quant(x(), x(), w(), 0.0, return_norm=True), "eps is 0.0", "positive"),
    "eps of latents": (lambda: latent(eps=0.0), "eps is 0.0", "positive"),
    "eps of quantized latents": (lambda: latent(eps=-1e-6, quantize_kv=True), "eps is -1e-06", "positive"),
    "weight offset beyond fp32": (
        lambda: nq.rms_norm_quant(x(), w(), weight_offset=1e39),
        "weight_offset is 1e+39",
        "finite in fp32",
    ),
    "half a gate": (lambda: silu_mul_quant(x(M, 3 * 128)), "384", "multiple of the group, 128"),
    "limit = 0": (lambda: silu_mul_quant(x(M, 256), limit=0.0), "limit is 0.0", "positive normal bfloat16"),
    "limit = -7": (lambda: silu_mul_quant(x(M, 256), limit=-7), "limit is -7", "positive normal bfloat16"),
    "limit = inf": (lambda: silu_mul_quant(x(M, 256), limit=float("inf")), "limit is inf", "3.38"),
    "limit = nan": (lambda: silu_mul_quant(x(M, 256), limit=float("nan")), "limit is nan", "3.38"),
    "limit beyond fp16": (lambda: silu_mul_quant(x(M, 256, dtype=torch.float16), limit=7e4), "70000.0", "65504"),
    "empty gate": (lambda: silu_mul_quant(x(M, 0)), "0", "multiple of the group, 128"),
    "gate of other shape": (lambda: nq.gated_norm_quant(x(), x(M, 128), w(128)), "z is (5, 128)", "(5, 384)"),
    "gate of other dtype": (lambda: nq.gated_norm_quant(x(), x(dtype=torch.float16), w(128)), "float16", "bfloat16"),
    "gate elsewhere": (lambda: nq.gated_norm_quant(x(), x(device="meta"), w(128)), "z is on meta", "one device"),
    "gate columns apart": (lambda: nq.gated_norm_quant(x(), x(M, 2 * K)[:, ::2], w(128)), "z has", "last stride"),
    "head of 96": (lambda: nq.gated_norm_quant(x(), x(), w(96)), "(96,)", "16, 32, 64, 128, 256, 512, 1024"),
    "head of 8": (lambda: nq.gated_norm_quant(x(), x(), w(8)), "(8,)", "16, 32"),
    "half a head": (lambda: nq.gated_norm_quant(x(), x(), w(256)), "384 columns", "heads of 256 values"),
    "eps of a gated norm": (lambda: nq.gated_norm_quant(x(), x(), w(128), 0.0), "eps is 0.0", "positive"),
    "no k_pe": (lambda: latent(x(M, Q + C)), "384", "even number"),
    "odd k_pe": (lambda: latent(x(M, Q + C + 31)), "415", "even number"),
    "q_a of half a group": (lambda: latent(x(M, Q + C + R), w(192), w(C)), "192", "multiple of the group, 128"),
    "latent weight dtype": (lambda: latent(c=w(C, torch.float64)), "float64", "bfloat16, float16, float32"),
    "narrow cos": (lambda: latent(cos=angles(M, 15)), "(5, 15)", "16 or more"),
    "integer sin": (lambda: latent(sin=angles(dtype=torch.int32)), "int32", "floating point"),
    "few angles": (lambda: latent(cos=angles(4)), "4", "5 rows"),
    "float positions": (lambda: latent(positions=torch.ones(M)), "float32", "int32 or int64"),
    "few positions": (lambda: latent(positions=torch.ones(4, dtype=torch.int32)), "(4,)", "[5]"),
    "unknown rope": (lambda: latent(rope="neox"), "'neox'", "'interleaved', 'half', 'interleaved_to_half'"),
}


@pytest.mark.parametrize("name", CASES)
def test_eager(name):
    call, given, accepted = CASES[name]
    with pytest.raises(ValueError) as error:
        call()
    message = str(error.value)
    assert given in message and accepted in message, message
    assert "\n" not in message


@pytest.mark.parametrize("name", CASES)
def test_fake_tensors(name):
    call, given, accepted = CASES[name]
    with FakeTensorMode(), pytest.raises(ValueError) as error:
        call()
    message = str(error.value)
    assert given in message and accepted in message, message


@pytest.mark.parametrize("name", CASES)
def test_compiled(name):
    # Dynamo wraps an error of an op in its own type; the sentence must be in what the user reads.
    call, given, accepted = CASES[name]
    torch._dynamo.reset()
    with pytest.raises((ValueError, RuntimeError)) as error:
        torch.compile(call, backend="aot_eager")()
    message = str(error.value)
    assert given in message and accepted in message, message


NUMBERS = (float("nan"), float("inf"), -float("inf"))  # none that a compile would trace


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("mode", [contextlib.nullcontext, FakeTensorMode])
def test_numbers_must_be_finite(mode, number):
    with mode():
        for call in (
            lambda: nq.rms_norm_quant(x(), w(), number),
            lambda: nq.add_rms_norm_quant(x(), x(), w(), number, return_norm=True),
            lambda: latent(eps=number),
            lambda: latent(eps=number, quantize_kv=True),
        ):
            with pytest.raises(ValueError, match=f"eps is {number}; it must be a positive"):
                call()
        for call in (
            lambda: nq.rms_norm_quant(x(), w(), weight_offset=number, return_norm=True),
            lambda: nq.add_rms_norm_quant(x(), x(), w(), weight_offset=number),
        ):
            with pytest.raises(ValueError, match=f"weight_offset is {number}; it must be finite"):
                call()


def test_eps_in_a_tensor_is_checked_when_it_is_read():
    args = x(), w(), torch.tensor(0.0, dtype=torch.float64), 0.0, QuantSpec().encode()
    with pytest.raises(ValueError, match=r"eps is 0\.0"):
        torch.ops.normquant.rms_norm_quant.tensor(*args)
    with FakeTensorMode():
        fake = x(), w(), torch.empty((), dtype=torch.float64), 0.0, QuantSpec().encode()
        assert torch.ops.normquant.rms_norm_quant.tensor(*fake)[0].shape == (M, K)  # its value is not known


def test_eps_of_a_compile_with_symbolic_floats():
    compiled = torch.compile(lambda a, eps: nq.rms_norm_quant(a, w(), eps).data, backend="aot_eager", dynamic=True)
    for eps in (1e-6, 1e-5, 2e-5):
        assert torch.equal(compiled(x(), eps).float(), nq.rms_norm_quant(x(), w(), eps).data.float())


def test_the_smallest_eps_is_enough_for_a_row_of_zeros():
    zeros = torch.zeros(1, K, dtype=torch.bfloat16)
    for eps in (torch.finfo(torch.float32).tiny, 1e-6):
        q, norm = nq.rms_norm_quant(zeros, w(), eps, return_norm=True)
        assert not q.data.float().any() and not norm.any()
        assert torch.equal(q.scale, torch.full((1, K // 128), 1e-10) / 448)


def rope(x, heads, r, rows=M):
    cos = angles(rows, r // 2)
    return torch.ops.normquant.rope_last(x, cos, cos, None, heads, r, "half", QuantSpec().encode())


OP_CASES = {
    "3-D x": (lambda: torch.ops.normquant.group_quant(x(2, 3, K), QuantSpec().encode()), "3 dimensions", "[M, K]"),
    "1-D x": (lambda: torch.ops.normquant.silu_mul_quant(x(K), None, QuantSpec().encode()), "1 dimensions", "[M, K]"),
    "1-D x to be turned": (lambda: rope(x(K), 4, 32), "(384,)", "[M, H * D]"),
    "fp32 to be turned": (lambda: rope(x(dtype=torch.float32), 4, 32), "float32", "bfloat16, float16"),
    "heads of several widths": (lambda: rope(x(), 7, 32), "384 columns", "7 heads of one width"),
    "more than a head": (lambda: rope(x(), 16, 32), "r is 32", "even number of the 24 values"),
    "an odd part of a head": (lambda: rope(x(), 4, 31), "r is 31", "even number"),
    "few angles to turn by": (lambda: rope(x(), 4, 32, rows=4), "4", "5 rows"),
    "a spec that is none": (lambda: torch.ops.normquant.group_quant(x(), "fp8"), "'fp8'", "encoded QuantSpec"),
}


@pytest.mark.parametrize("name", OP_CASES)
def test_ops_check_for_themselves(name):
    call, given, accepted = OP_CASES[name]
    with pytest.raises(ValueError) as error:
        call()
    assert given in str(error.value) and accepted in str(error.value), str(error.value)


def positions(step: int = 1, device: str = "cpu") -> torch.Tensor:
    return torch.ones(step * M, dtype=torch.int32, device=device)[::step]


# a call -> how the sentence begins: the argument by its name, and what is wrong with it
BEGINNINGS = {
    "x of group_quant": (lambda: nq.group_quant(x(dtype=torch.int16)), "x has dtype torch.int16;"),
    "width of group_quant": (lambda: nq.group_quant(x(M, 192)), "x has K = 192;"),
    "x of a norm": (lambda: nq.rms_norm_quant(x(dtype=torch.float32), w()), "x has dtype torch.float32;"),
    "width of a norm": (lambda: nq.rms_norm_quant(x(M, 192), w(192)), "x has K = 192;"),
    "too wide a norm": (lambda: nq.rms_norm_quant(x(1, 65664), w(65664)), "K is 65664; the norm kernels hold a row"),
    "too wide a latent": (lambda: check_normed_width(65664, QuantSpec(), "q_a"), "K of q_a is 65664; the norm kernels"),
    "width of a latent": (lambda: check_normed_width(192, QuantSpec(), "q_a"), "q_a has K = 192;"),
    "weight's dtype": (lambda: nq.rms_norm_quant(x(), w(dtype=torch.float64)), "weight has dtype torch.float64;"),
    "weight's device": (lambda: nq.rms_norm_quant(x(), w(device="meta")), "weight is on meta and x on cpu;"),
    "residual": (lambda: nq.add_rms_norm_quant(x(), x(M, 2 * K)[:, ::2], w()), "residual has stride (768, 2);"),
    "residual's device": (lambda: nq.add_rms_norm_quant(x(), x(device="meta"), w()), "residual is on meta and x on"),
    "cos": (lambda: latent(cos=angles(M, 15)), "cos is (5, 15) float32;"),
    "sin": (lambda: latent(sin=angles(dtype=torch.int32)), "sin is (5, 16) int32;"),
    "cos's device": (lambda: latent(cos=angles(device="meta")), "cos is on meta and x on cpu;"),
    "rows of sin": (lambda: latent(cos=angles(6), sin=angles(4)), "cos and sin have 6 and 4 rows for 5 rows of x"),
    "positions": (lambda: latent(positions=positions(step=2)), "positions is (5,) int32;"),
    "positions' device": (
        lambda: latent(positions=torch.ones(M, dtype=torch.int32, device="meta")),
        "positions is on meta and x on",
    ),
    "rope": (lambda: latent(rope="neox"), "rope is 'neox';"),
}


@pytest.mark.parametrize("name", BEGINNINGS)
def test_the_sentence_names_the_argument(name):
    call, beginning = BEGINNINGS[name]
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value).startswith(beginning), str(error.value)


def test_as_many_angles_as_rows_and_positions_for_each_are_enough():
    few = x(M, K), angles(M), angles(M)
    check_angles(*few, None, R, "half")
    with pytest.raises(ValueError, match="cos and sin have 5 and 4 rows"):
        check_angles(x(M, K), angles(M), angles(4, 20), None, R, "half")
    for dtype in (torch.int32, torch.int64):
        check_angles(*few, torch.zeros(M, dtype=dtype), R, "half")


def test_no_rows_in_any_number_of_dimensions_are_no_rows():
    assert rows("x", x(0, 3, K)).shape == rows("x", x(2, 0, K)).shape == (0, K)


def test_limits_are_accepted():
    check_normed_width(65536, QuantSpec(), "x")
    check_eps(torch.finfo(torch.float32).max)
    check_weight_offset(-torch.finfo(torch.float32).max)


@pytest.mark.parametrize("layout", ["row", "col", "col_tma"])
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (1, 1)])
def test_leading_dimensions_come_back(lead, layout):
    spec = QuantSpec(layout=layout)
    q = nq.group_quant(x(*lead, K), spec=spec)
    assert q.spec == spec and q.data.shape == (*lead, K) and q.scale.shape == (*lead, K // 128)
    if len(lead) == 1:
        assert q.scale.stride() == spec.scale_stride(*lead, K)


@pytest.mark.parametrize("scale", ["fp32", "ue8m0_packed"])
def test_a_fake_result_is_like_a_real_one(scale):
    spec = QuantSpec(scale=scale, layout="col_tma")
    real = nq.group_quant(x(), spec=spec)
    for made, expected in zip(fake_quant(x(), M, K, spec), (real.data, real.scale), strict=True):
        assert (made.shape, made.stride(), made.dtype) == (expected.shape, expected.stride(), expected.dtype)


def test_shapes_are_told_with_commas():
    assert shapes(x(2, 3), w(4)) == "(2, 3), (4,)"


def test_what_looks_odd_and_is_accepted():
    activation, weight = activations(M, K), weights(K)
    expected = nq.rms_norm_quant(activation, weight)
    wide = torch.zeros(M, K + 3, dtype=torch.bfloat16)
    wide[:, 1 : K + 1] = activation
    for same in (wide[:, 1 : K + 1], activation.t().contiguous().t()[:, :].contiguous()):
        got = nq.rms_norm_quant(same, weight)
        assert torch.equal(got.data.float(), expected.data.float()) and torch.equal(got.scale, expected.scale)
    one = activation[:1].expand(M, K)  # rows that are one row
    got = nq.rms_norm_quant(one, weight)
    assert torch.equal(got.data.float(), expected.data[:1].float().expand(M, K))
    first = nq.rms_norm_quant(activation[0], weight)  # 1-D
    assert first.shape == (K,) and torch.equal(first.scale, expected.scale[0])
