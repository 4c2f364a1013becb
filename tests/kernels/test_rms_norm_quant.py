"""The norm kernel, interpreted on CPU, against the reference: equal to the bit."""

from itertools import product

import pytest
import torch
from shared import interpreter
from shared.compare import assert_bitwise, pad_rows
from shared.inputs import activations, awkward, weights

from normquant import QuantSpec, reference, specs
from normquant.kernels.configs import Config

KS = (512, 1536, 2048, 4096, 5120, 7168, 8192)
LAYOUTS = ("row", "col", "col_tma")
ROUNDINGS = ("none", "inner", "once", "twice")
NAMED = [name for name in vars(specs) if name.isupper()]


def check(x, residual, weight, spec, *, weight_offset=0.0, eps=1e-6, **config):
    config = Config(4, **config)
    got = interpreter.run("rms_norm_quant", x, residual, weight, eps, spec, weight_offset, True, config)
    if residual is None:
        data, scale, norm = reference.rms_norm_quant(x, weight, eps, spec, weight_offset)
        expected = data, scale, None, norm
    else:
        expected = reference.add_rms_norm_quant(x, residual, weight, eps, spec, weight_offset)
    assert_bitwise(got, expected)
    if spec.layout == "col_tma":
        assert not pad_rows(got[1], spec.scale_rows(len(x))).any()


@pytest.mark.parametrize(("i", "m", "k"), [(i, m, k) for i, (m, k) in enumerate(product((1, 3, 8, 64, 257), KS))])
def test_every_size(i, m, k):
    # The sizes times each other; the other choices cycle, so that each meets every K and every M.
    dtype = (torch.bfloat16, torch.float16)[i % 2]
    strided = i % 3 == 1
    x = awkward(m, k, dtype, strided=strided)
    residual = activations(m, k, dtype, seed=1, strided=not strided) if (i // 2) % 2 else None
    check(x, residual, weights(k, dtype), QuantSpec(layout=LAYOUTS[i % 3], rounding=ROUNDINGS[i % 4]))


@pytest.mark.parametrize(
    ("dtype", "with_residual", "layout", "strided"),
    list(product((torch.bfloat16, torch.float16), (False, True), LAYOUTS, (False, True))),
)
def test_every_form(dtype, with_residual, layout, strided):
    for m, k in ((1, 1536), (3, 512), (9, 1536)):
        residual = awkward(m, k, dtype, seed=3) if with_residual else None
        check(activations(m, k, dtype, strided=strided), residual, weights(k, dtype), QuantSpec(layout=layout))


@pytest.mark.parametrize("name", ["HF", "DEEPGEMM_PACKED"])
@pytest.mark.parametrize("tiles", [2, 3])
@pytest.mark.parametrize("k", [384, 640, 1536, 2304, 5120, 7168, 8192])
def test_a_row_in_several_tiles(k, tiles, name):
    x, residual = awkward(5, k, strided=True), activations(5, k, seed=1)
    for rows, late_weight in ((1, False), (1, True), (4, False)):
        if rows * k <= 8192:  # more does not fit into registers
            spec = getattr(specs, name).replace(layout="col_tma") if name == "HF" else getattr(specs, name)
            check(x, residual, weights(k), spec, rows=rows, tiles=tiles, late_weight=late_weight, weight_offset=1.0)


@pytest.mark.parametrize("layout", ["row", "col_tma", "packed"])
@pytest.mark.parametrize("rows", [2, 8])
@pytest.mark.parametrize("k", [512, 1536])
def test_several_rows_for_a_program(k, rows, layout):
    spec = QuantSpec(layout=layout) if layout != "packed" else specs.DEEPGEMM_PACKED
    for m in (1, 2, 9, 16):
        x, residual = awkward(m, k, strided=True), activations(m, k, seed=1)
        check(x, residual if m % 2 else None, weights(k), spec, rows=rows)


@pytest.mark.parametrize("weight_offset", [0.0, 1.0])
def test_a_weight_that_is_read_late(weight_offset):
    for m, rows in ((1, 1), (9, 1), (9, 4)):
        x, residual = awkward(m, 512), activations(m, 512, seed=1)
        check(x, residual, weights(512), QuantSpec(), rows=rows, late_weight=True, weight_offset=weight_offset)


@pytest.mark.parametrize("rows", [1, 4])
def test_what_is_read_may_leave_the_l2_first(rows):
    x, residual = awkward(9, 512), activations(9, 512, seed=1)
    check(x, residual, weights(512), QuantSpec(), rows=rows, evict_first=True, keep_sum=True)


@pytest.mark.parametrize(
    "choices", [{"rows": 2, "split": 2}, {"rows": 2, "prefetch": True}, {"split": 2, "evict_first": True}]
)
def test_choices_that_do_not_go_together(choices):
    with pytest.raises(ValueError, match="row"):
        Config(4, **choices)


@pytest.mark.parametrize("name", NAMED)
def test_every_named_spec(name):
    spec = getattr(specs, name)
    check(awkward(9, 1536), activations(9, 1536, seed=1), weights(1536), spec)


@pytest.mark.parametrize("scale", ["fp32", "ue8m0", "ue8m0_packed"])
@pytest.mark.parametrize("group", [128, 64, 32])
def test_every_format(group, scale):
    for k in (512, 1536, 2304):  # 2304/128 = 18 groups: not a multiple of the four that one int32 packs
        check(awkward(9, k), None, weights(k), QuantSpec(group=group, scale=scale, layout="col_tma"))


@pytest.mark.parametrize("split", [1, 2, 3, 4, 7, 14])
def test_a_split_row_is_the_same_row(split):
    check(awkward(9, 7168), activations(9, 7168, seed=1), weights(7168), QuantSpec(layout="col_tma"), split=split)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gemma_and_mixed_dtypes(weight_dtype):
    check(awkward(9, 1536), None, weights(1536, weight_dtype) - 1, QuantSpec(), weight_offset=1.0)


@pytest.mark.parametrize("sum_", ["fp32", "rounded"])
def test_what_the_norm_reads_after_the_add(sum_):
    x, residual = activations(5, 1536), activations(5, 1536, seed=1)
    check(x, residual, weights(1536), QuantSpec(sum=sum_))
    rounded = reference.add_rms_norm_quant(x, residual, weights(1536), 1e-6, QuantSpec(sum="rounded"))
    unrounded = reference.add_rms_norm_quant(x, residual, weights(1536), 1e-6, QuantSpec(sum="fp32"))
    assert (rounded[3] != unrounded[3]).any()  # the two really are different arithmetic


def test_odd_strides_and_offsets():
    wide = activations(7, 1536 * 2 + 3)
    check(wide[:, 1:1537], wide[:, 1500:3036], weights(1536), QuantSpec())


def test_no_rows():
    check(activations(0, 1536), activations(0, 1536), weights(1536), QuantSpec(layout="col_tma"))


def test_the_longest_row():
    check(activations(2, 65536), None, weights(65536), QuantSpec())
    with pytest.raises(ValueError, match="K is 65664; the norm kernels hold a row in registers and take at most 65536"):
        check(activations(2, 65664), None, weights(65664), QuantSpec())
