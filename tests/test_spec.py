"""QuantSpec: what it refuses, its string form, and the tensors it describes."""

import io
from dataclasses import FrozenInstanceError, fields, replace
from itertools import product
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shared.compare import bits, pad_rows
from shared.inputs import activations
from torch.utils import _pytree as pytree

from normquant import QuantizedActivation, QuantSpec, reference, specs
from normquant.spec import GROUPS, Divide, Layout, Nan, Rounding, ScaleBy, ScaleEncoding, Sum, empty_scale

MS = (0, 1, 2, 3, 4, 5, 8, 257)
KS = (128, 384, 512, 2304, 7168)
FORMATS = [
    QuantSpec(group=group, scale=scale, layout=layout)
    for group, scale, layout in product(GROUPS, get_args(ScaleEncoding), get_args(Layout))
    if scale != "ue8m0_packed" or layout == "col_tma"
]


def describe(spec: QuantSpec) -> str:
    return f"{spec.group}-{spec.scale}-{spec.layout}"


@pytest.mark.parametrize(
    ("field", "given_", "accepted"),
    [
        ("dtype", torch.float8_e5m2, "torch.float8_e4m3fn"),
        ("group", 96, "128"),
        ("group", 0, "32, 64, 128"),
        ("scale", "fp16", "'fp32', 'ue8m0', 'ue8m0_packed'"),
        ("layout", "column", "'row', 'col', 'col_tma'"),
        ("rounding", "never", "'none', 'inner', 'once', 'twice'"),
        ("sum", "bf16", "'fp32', 'rounded'"),
        ("scale_by", "shift", "'scalar', 'divide', 'multiply'"),
        ("divide", "s", "'scale', 'reciprocal', 'amax'"),
        ("nan", "zero", "'propagate', 'ignore'"),
    ],
)
def test_an_unknown_choice_is_named_with_the_known_ones(field, given_, accepted):
    with pytest.raises(ValueError) as error:
        QuantSpec(**{field: given_})
    assert str(error.value).startswith(f"{field} is "), str(error.value)
    assert str(given_) in str(error.value) and accepted in str(error.value)


@pytest.mark.parametrize("layout", ["row", "col"])
def test_packed_scales_are_column_major(layout):
    with pytest.raises(ValueError, match=rf"layout='{layout}'.*'col_tma'"):
        QuantSpec(scale="ue8m0_packed", layout=layout)


@pytest.mark.parametrize(
    "changes", [{"scale": "ue8m0"}, {"scale": "ue8m0_packed", "layout": "col_tma"}, {"scale_floor": 1e-6}]
)
@pytest.mark.parametrize("divide", ["amax", "fast_amax", "factor"])
def test_dividing_by_amax_needs_a_scale_that_is_amax_over_448(divide, changes):
    with pytest.raises(ValueError, match=rf"divide='{divide}'.*fp32"):
        QuantSpec(divide=divide, **changes)


@pytest.mark.parametrize(
    ("floor", "scale_floor"),
    [(0.0, 0.0), (-1.0, 0.0), (1e-30, 0.0), (448 * 2.0**-65, 2.0**-65), (float("nan"), 0.0), (0.0, float("nan"))],
)
def test_a_scale_is_never_zero_or_denormal(floor, scale_floor):
    with pytest.raises(ValueError, match="floor"):
        QuantSpec(floor=floor, scale_floor=scale_floor)


@pytest.mark.parametrize("field", ["floor", "scale_floor"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_floors_are_finite(field, value):
    with pytest.raises(ValueError, match=f"{field}.*{value}"):
        QuantSpec(**{field: value})


@pytest.mark.parametrize(("floor", "scale_floor"), [(448 * 2.0**-64, 0.0), (0.0, 2.0**-64)])
def test_the_smallest_floor_is_accepted(floor, scale_floor):
    spec = QuantSpec(floor=floor, scale_floor=scale_floor)
    zeros = torch.zeros(1, 128)
    data, scale = reference.quantize(zeros, spec)
    assert scale.item() == 2.0**-64 and not data.float().any()


def test_a_spec_is_a_value():
    with pytest.raises(FrozenInstanceError):
        QuantSpec().group = 64
    assert QuantSpec() == QuantSpec() and hash(QuantSpec()) == hash(QuantSpec())
    assert QuantSpec().replace(group=64) == QuantSpec(group=64) != QuantSpec()
    with pytest.raises(ValueError, match="group is 5"):
        QuantSpec().replace(group=5)


def all_choices():
    """Every combination of choices that QuantSpec accepts: those refused are refused by one of the rules above."""
    choices = (get_args(t) for t in (ScaleEncoding, Layout, Rounding, Sum, ScaleBy, Divide, Nan))
    for group, (scale, layout, rounding, sum_, by, divide, nan) in product(GROUPS, product(*choices)):
        own_scale = divide.endswith(("amax", "factor"))
        if (scale == "ue8m0_packed" and layout != "col_tma") or (own_scale and scale != "fp32"):
            continue
        if divide == "fast_factor" and nan != "propagate":
            continue
        spec = QuantSpec(group=group, scale=scale, layout=layout, rounding=rounding, sum=sum_, scale_by=by, nan=nan)
        yield replace(spec, divide=divide, floor=0.0 if divide == "fast_factor" else spec.floor)


def test_a_spec_prints_as_one_writes_it():
    assert str(QuantSpec()) == "QuantSpec()"
    assert str(QuantSpec(rounding="twice", layout="col_tma")) == "QuantSpec(layout='col_tma', rounding='twice')"
    names = [field.name for field in fields(QuantSpec)]
    for name in filter(str.isupper, vars(specs)):
        spec = getattr(specs, name)
        assert eval(str(spec)) == spec and str(spec).count("=") == sum(
            getattr(spec, field) != getattr(QuantSpec(), field) for field in names
        )


def test_every_combination_survives_its_string():
    every = list(all_choices())
    texts = {spec.encode() for spec in every}
    assert len(texts) == len(every) == 3 * (3 * (5 * 2 + 1) + 2 * 4 * 2) * 4 * 2 * 3  # no two share a string
    assert all(QuantSpec.decode(spec.encode()) == spec for spec in every)


@given(
    floor=st.floats(0.0, 3e38),
    scale_floor=st.floats(2.0**-64, 3e38),
    spec=st.sampled_from([spec for spec in all_choices() if spec.divide in ("scale", "reciprocal")]),
)
def test_floors_survive_to_the_last_bit(floor, scale_floor, spec):
    spec = replace(spec, floor=floor, scale_floor=scale_floor)
    decoded = QuantSpec.decode(spec.encode())
    assert decoded == spec and decoded.encode() == spec.encode()


def test_one_rule_for_few_rows_and_another_for_many():
    spec = specs.VLLM_UE8M0.replace(layout="col_tma", few_rows=32)
    assert spec.at(31) == specs.FLASHINFER_LINEAR and spec.at(32) == spec.replace(few_rows=0) == spec.at(10**6)
    assert spec.at(0) == specs.FLASHINFER_LINEAR and specs.VLLM.at(1) is specs.VLLM
    assert QuantSpec.decode(spec.encode()) == spec
    assert spec.scale_shape(7, 512) == spec.at(7).scale_shape(7, 512)
    assert spec.scale_stride(7, 512) == spec.at(7).scale_stride(7, 512)
    for changes in ({"few_rows": -1}, {"few_rows": 2, "scale": "ue8m0_packed"}):
        with pytest.raises(ValueError, match="few_rows is"):
            spec.replace(**changes)
    with pytest.raises(ValueError, match="few_rows is 2"):
        specs.FLASHINFER_LINEAR.replace(few_rows=2)
    for changes in ({"floor": 1e-10}, {"scale": "ue8m0"}, {"nan": "ignore"}):
        with pytest.raises(ValueError, match=r"^divide='fast_factor' has no floors and no choice of nan"):
            specs.FLASHINFER_LINEAR.replace(**changes)


def test_specs_are_spread_over_the_buckets_of_a_dict():
    every = list(all_choices())
    assert len({hash(spec) for spec in every}) > len(every) - 10


@pytest.mark.parametrize("name", [name for name in vars(specs) if name.isupper()])
def test_named_specs_survive_their_string(name):
    assert QuantSpec.decode(getattr(specs, name).encode()) == getattr(specs, name)


@given(st.text())
def test_any_other_text_is_a_value_error(text):
    try:
        spec = QuantSpec.decode(text)
    except ValueError:
        return
    assert QuantSpec.decode(spec.encode()) == spec


@pytest.mark.parametrize("position", range(len(QuantSpec().encode().split(","))))
def test_a_damaged_field_is_a_value_error(position):
    parts = QuantSpec().encode().split(",")
    parts[position] = "nn"  # also an attribute of torch, though no dtype
    with pytest.raises(ValueError):
        QuantSpec.decode(",".join(parts))
    parts[position] = "float7"  # no attribute of torch
    with pytest.raises(ValueError):
        QuantSpec.decode(",".join(parts))


@pytest.mark.parametrize("spec", FORMATS, ids=describe)
def test_scales_have_the_device_asked_for_and_no_default_dtype(spec):
    torch.set_default_dtype(torch.float64)
    try:
        scale = empty_scale(5, 512, spec, torch.device("meta"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert scale.dtype == spec.scale_dtype and scale.device.type == "meta"
    data = torch.empty(5, 512, dtype=spec.dtype, device="meta")
    assert QuantizedActivation(data, scale, spec).scales().device.type == "meta"
    assert type(spec.bytes(5, 512)) is int


@pytest.mark.parametrize("spec", FORMATS, ids=describe)
def test_shape_stride_and_bytes_are_those_of_the_tensors(spec):
    for m, k in product(MS, KS):
        scale = empty_scale(m, k, spec, torch.device("cpu"))
        assert tuple(scale.shape) == spec.scale_shape(m, k), (m, k)
        assert scale.stride() == spec.scale_stride(m, k), (m, k)
        assert scale.dtype == spec.scale_dtype
        assert m * k + scale.untyped_storage().nbytes() == spec.bytes(m, k), (m, k)


@pytest.mark.parametrize("spec", FORMATS, ids=describe)
def test_sizes_by_hand(spec):
    groups = 2304 // spec.group
    columns = {"fp32": groups, "ue8m0": groups, "ue8m0_packed": {128: 5, 64: 9, 32: 18}[spec.group]}[spec.scale]
    assert spec.scale_shape(5, 2304) == (5, columns)
    assert spec.scale_stride(5, 2304) == {"row": (columns, 1), "col": (1, 5), "col_tma": (1, 8)}[spec.layout]
    assert spec.bytes(5, 2304) == 5 * 2304 + 4 * columns * {"row": 5, "col": 5, "col_tma": 8}[spec.layout]


@pytest.mark.parametrize("spec", [s for s in FORMATS if s.layout == "col_tma"], ids=describe)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 7, 8])
def test_tma_padding_is_memory_of_the_scale_and_zero(spec, m):
    _, scale = reference.group_quant(activations(m, 2304), spec)
    rows = spec.scale_rows(m)
    assert rows % 4 == 0 and 0 <= rows - m < 4 and scale.stride(1) * 4 % 16 == 0
    padding = pad_rows(scale, rows)  # as_strided raises where the storage is too small
    assert padding.shape == (rows - m, scale.shape[1]) and not padding.any()


def quantized(m: int, k: int, spec: QuantSpec) -> QuantizedActivation:
    return QuantizedActivation(*reference.group_quant(activations(m, k), spec), spec)


@pytest.mark.parametrize("spec", FORMATS, ids=describe)
def test_scales_are_the_ones_that_were_stored(spec):
    for m, k in ((1, 128), (3, 384), (5, 2304)):
        q = quantized(m, k, spec)
        _, expected = reference.quantize(activations(m, k).float(), spec)
        assert q.scales().dtype == torch.float32 and q.scales().shape == (m, k // spec.group)
        assert torch.equal(q.scales(), expected)
        assert q.shape == (m, k)


@pytest.mark.parametrize("spec", FORMATS, ids=describe)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantize_is_a_product_rounded_once(spec, dtype):
    q = quantized(5, 2304, spec)
    exact = q.data.double() * q.scales().double().repeat_interleave(spec.group, dim=1)
    # the fp32 product is rounded from the exact one, then to dtype
    assert torch.equal(q.dequantize(dtype), exact.float().to(dtype))
    assert q.dequantize(dtype).dtype == dtype


@pytest.mark.parametrize("spec", FORMATS, ids=describe)
def test_leading_dimensions(spec):
    data, scale = reference.group_quant(activations(6, 384), spec)
    q = QuantizedActivation(data.view(2, 3, 384), scale.view(2, 3, -1), spec)
    flat = QuantizedActivation(data, scale, spec)
    assert q.shape == (2, 3, 384)
    assert torch.equal(q.scales(), flat.scales().view(2, 3, -1))
    assert torch.equal(bits(q.dequantize()), bits(flat.dequantize().view(2, 3, 384)))


def test_packed_exponents_by_hand():
    # 2304 = 18 groups: four int32 and a half. 2**e is stored as e + 127, the first group in the lowest byte.
    spec = QuantSpec(scale="ue8m0_packed", layout="col_tma")
    exponents = torch.tensor([[0, 1, -1, 127, -64, 5, 6, 7, 0, 0, 0, 0, 1, 2, 3, 4, -20, 20]])
    scale = reference.store_scale(torch.exp2(exponents.float()), 2304, spec)
    words = [127 | 128 << 8 | 126 << 16 | 254 << 24, 63 | 132 << 8 | 133 << 16 | 134 << 24, 0x7F7F7F7F]
    words += [128 | 129 << 8 | 130 << 16 | 131 << 24, 107 | 147 << 8]
    unsigned = [word & 0xFFFFFFFF for word in scale[0].tolist()]
    assert unsigned == words
    q = QuantizedActivation(torch.zeros(1, 2304, dtype=torch.float8_e4m3fn), scale, spec)
    assert torch.equal(q.scales(), torch.exp2(exponents.float()))


@pytest.mark.parametrize(("nan", "of_nan", "of_inf"), [("propagate", 254, 254), ("ignore", 128 - 8, 255)])
@pytest.mark.parametrize("scale", ["ue8m0", "ue8m0_packed"])
def test_the_power_of_two_of_nan_and_inf(scale, nan, of_nan, of_inf):
    spec = QuantSpec(scale=scale, layout="col_tma", nan=nan)
    y = torch.full((1, 384), 2.0)  # 2/448 is a little below 2**-7
    y[0, 3], y[0, 130] = float("nan"), float("inf")
    data, stored = reference.group_quant(y.bfloat16(), spec)
    q = QuantizedActivation(data, stored, spec)
    exponents = torch.tensor([[of_nan, of_inf, 128 - 8]], dtype=torch.int32)
    assert torch.equal(q.scales().view(torch.int32) >> 23, exponents)
    assert torch.equal(q.scales().view(torch.int32) & 0x7FFFFF, torch.zeros_like(exponents))
    assert data[0, 3].isnan() and data[0, 130].isnan() and q.dequantize()[0, 3].isnan()
    assert q.dequantize()[0, 256:].isfinite().all()


def test_packed_inf_and_nan_scales_decode_to_inf():
    # no group has such scales but an inf with nan="ignore"
    spec = QuantSpec(scale="ue8m0_packed", layout="col_tma")
    scale = reference.store_scale(torch.tensor([[float("inf"), float("nan"), 1.0]]), 384, spec)
    q = QuantizedActivation(torch.zeros(1, 384, dtype=torch.float8_e4m3fn), scale, spec)
    assert q.scales().tolist() == [[float("inf"), float("inf"), 1.0]]


@pytest.mark.parametrize(
    "spec", [QuantSpec(), QuantSpec(scale="ue8m0_packed", layout="col_tma")], ids=["fp32", "packed"]
)
def test_a_quantized_activation_is_a_pytree(spec: QuantSpec) -> None:
    q = QuantizedActivation(torch.zeros(2, 512), torch.ones(2, 4), spec)
    leaves, tree = pytree.tree_flatten({"q": q})
    assert leaves[0] is q.data and leaves[1] is q.scale and len(leaves) == 2
    again = pytree.tree_unflatten(leaves, tree)["q"]
    assert again.data is q.data and again.scale is q.scale
    assert pytree.treespec_loads(pytree.treespec_dumps(tree)) == tree
    doubled = pytree.tree_map(lambda t: t * 2, q)
    assert torch.equal(doubled.scale, q.scale * 2) and doubled.spec == spec
    other = pytree.tree_structure({"q": QuantizedActivation(q.data, q.scale, QuantSpec(group=64))})
    assert other != tree
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(q)[0]]
    assert paths == [".data", ".scale"]


def test_torch_load_reads_a_quantized_activation() -> None:
    q = QuantizedActivation(torch.zeros(2, 128), torch.ones(2, 1), QuantSpec(scale="ue8m0"))
    file = io.BytesIO()
    torch.save(q, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert loaded.spec == q.spec and hash(loaded.spec) == hash(q.spec) and torch.equal(loaded.scale, q.scale)
