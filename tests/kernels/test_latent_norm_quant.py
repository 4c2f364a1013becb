"""The latent kernel, interpreted on CPU, against the reference: equal to the bit."""

import pytest
import torch
from shared import interpreter
from shared.compare import assert_bitwise
from shared.inputs import activations, awkward, weights

from normquant import QuantSpec, reference, specs
from normquant.kernels.configs import Config

Q, C, R = 1536, 512, 64  # DeepSeek-R1


def angles(positions: int, r: int = R, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.arange(positions).unsqueeze(1) * 10000.0 ** (-torch.arange(r // 2) / (r // 2))
    cache = torch.cat((angle.cos(), angle.sin()), dim=1).to(dtype)  # [positions, R], as vLLM holds it
    return cache[:, : r // 2], cache[:, r // 2 :]


def check(
    x,
    spec,
    *,
    q=Q,
    c=C,
    positions=None,
    rope="interleaved",
    quantize_kv=True,
    split=1,
    rows=1,
    cache_dtype=torch.bfloat16,
):
    cos, sin = angles(64, x.shape[1] - q - c, cache_dtype)
    args = (x, weights(q, x.dtype), weights(c, x.dtype, seed=1), cos, sin, positions, 1e-6, rope, spec)
    got = interpreter.run("latent_norm_quant", *args, quantize_kv, Config(4, split, rows))
    expected = reference.latent_norm_quant(*args)
    assert_bitwise(got, expected if quantize_kv else (*expected[:4], None, None))


@pytest.mark.parametrize("rope", ["interleaved", "half", "interleaved_to_half"])
@pytest.mark.parametrize("rounding", ["none", "inner", "once", "twice"])
def test_every_rope_and_rounding(rope, rounding):
    check(activations(5, Q + C + R), QuantSpec(rounding=rounding, layout="col_tma"), rope=rope)


@pytest.mark.parametrize("rope", ["interleaved", "half"])
@pytest.mark.parametrize("rows", [2, 8])
def test_several_rows_for_a_program(rows, rope):
    for m in (1, 2, 9, 16):
        positions = torch.arange(m).flip(0) if m % 2 else None
        check(awkward(m, Q + C + R), QuantSpec(layout="col_tma"), rows=rows, rope=rope, positions=positions)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantize_kv", [False, True])
@pytest.mark.parametrize("m", [0, 1, 9])
def test_every_form(m, quantize_kv, dtype):
    positions = torch.arange(m).flip(0).to(torch.int32 if m == 9 else torch.int64) * 3
    x = awkward(m, Q + C + R, dtype, strided=m == 9)
    check(x, QuantSpec(layout="col_tma"), positions=positions, quantize_kv=quantize_kv, cache_dtype=torch.float32)


@pytest.mark.parametrize("name", [name for name in vars(specs) if name.isupper()])
def test_every_named_spec(name):
    check(activations(5, Q + C + R), getattr(specs, name))


@pytest.mark.parametrize("split", [2, 3, 4])
def test_a_split_row_is_the_same_row(split):
    check(activations(5, Q + C + R), QuantSpec(scale="ue8m0_packed", layout="col_tma"), split=split)


def test_other_widths():
    check(activations(5, 256 + 128 + 24), QuantSpec(group=64), q=256, c=128)


def test_half_is_transformers_rope():
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
        apply_rotary_pos_emb,
        apply_rotary_pos_emb_interleave,
    )

    x = activations(6, R)
    cos, sin = angles(6)
    wide = lambda t: torch.cat((t, t), -1)[None]  # noqa: E731
    for rope, theirs in (("half", apply_rotary_pos_emb), ("interleaved_to_half", apply_rotary_pos_emb_interleave)):
        expected, _ = theirs(x[None, None], x[None, None], wide(cos), wide(sin))
        assert torch.equal(reference.rotate(x, cos, sin, rope, QuantSpec(rounding="twice")), expected[0, 0])
