"""The kernel of products split over K, interpreted on CPU, against the reference: equal to the bit."""

import pytest
import torch
from shared import interpreter
from shared.compare import assert_bitwise
from shared.inputs import activations, awkward
from shared.linear_weights import SIZES, SPECS, weight_of
from shared.machine_code import SM_90, SM_100, Code, compiling, machine_code
from shared.products import factors, parts_of

from normquant import QuantSpec, reference
from normquant.kernels.block_fp8_linear import block_fp8_linear
from normquant.kernels.product_configs import ProductConfig, blocks_of_part, split_of
from normquant.linear import dequantized_linear, quantize_weight
from normquant.linear.split_product import split_product


def expected(data, scale, weight, weight_scale, split=None):
    k, n = data.shape[1], weight.shape[0]
    blocks = blocks_of_part(k, split or split_of(k, n))
    return reference.block_fp8_linear(data, scale, weight, weight_scale, blocks).flatten(0, 1)


def check(args, config=None, split=None):
    got = interpreter.call(parts_of, *args, config, split)
    want = expected(*args, split)
    assert got.shape == want.shape and got.stride(0) % 8 == 0  # rows that whoever reads them loads 16 bytes at a time
    assert_bitwise([got.clone(memory_format=torch.contiguous_format)], [want])


@pytest.mark.parametrize(("n", "k"), [(512, 1536), *SIZES[1:]])
def test_every_size(n, k):
    for m in (0, 1, 5, 17):
        check(factors(m, n, k))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_every_layout_and_encoding_of_the_scales(spec):
    check(factors(5, 300, 384, spec))


@pytest.mark.parametrize("m", [16, 33, 64, 65, 130])
def test_rows_of_one_program_and_of_several(m):
    check(factors(m, 129, 256))


@pytest.mark.parametrize("split", [1, 2, 4, 5])
def test_parts_that_are_not_as_long_as_one_another(split):
    parts = -(-9 // -(-9 // split))  # 9 blocks of K
    check(factors(3, 70, 9 * 128), split=parts)


@pytest.mark.parametrize(
    "config", [ProductConfig(columns=128), ProductConfig(8, stages=2), ProductConfig(release="loaded")]
)
def test_configs_change_no_bit(config):
    check(factors(5, 300, 384), config)


def test_awkward_values():
    check(factors(16, 300, 384, x=awkward(16, 384)))
    check(factors(16, 300, 384, QuantSpec(scale="ue8m0"), x=awkward(16, 384)))


def test_a_nan_in_the_weight_stays_in_its_column():
    data, scale, weight, weight_scale = factors(3, 300, 384)
    weight.view(torch.uint8)[7, 130] = 0x7F
    check((data, scale, weight, weight_scale))
    nan = split_product(data, scale, weight, weight_scale, torch.bfloat16).isnan()
    assert nan[:, 7].all() and not nan[:, :7].any() and not nan[:, 8:].any()


def test_a_nan_block_makes_its_rows_nan():
    data, scale, weight, weight_scale = factors(3, 300, 384)
    weight_scale[1, 2] = float("nan")
    check((data, scale, weight, weight_scale))
    nan = split_product(data, scale, weight, weight_scale, torch.bfloat16).isnan()
    assert nan[:, 128:256].all() and not nan[:, :128].any() and not nan[:, 256:].any()


def test_rows_may_be_any_distance_apart():
    data, scale, weight, weight_scale = factors(5, 129, 256)
    for gap in (16, 3):
        wide = torch.zeros(5, 256 + gap, dtype=torch.uint8)
        wide[:, :256] = data.view(torch.uint8)
        check((wide.view(data.dtype)[:, :256], scale, weight, torch.nn.functional.pad(weight_scale, (0, 2))[:, :2]))


def test_memory_that_is_not_aligned():
    data, scale, weight, weight_scale = factors(5, 129, 256)

    def shifted(t):
        memory = torch.empty(t.numel() + 3, dtype=torch.uint8)
        memory[3:] = t.contiguous().view(torch.uint8).flatten()
        return memory[3:].view(t.dtype).view(t.shape)

    check((shifted(data), scale, shifted(weight), weight_scale))


def test_a_weight_of_two_layers_is_left_alone():
    data, scale, weight, weight_scale = factors(5, 129, 256)
    before = weight.view(torch.uint8).clone(), weight_scale.clone()
    first = interpreter.call(parts_of, data, scale, weight, weight_scale)
    again = interpreter.call(parts_of, data, scale, weight, weight_scale)
    assert_bitwise([first], [again])
    assert torch.equal(weight.view(torch.uint8), before[0]) and torch.equal(weight_scale, before[1])


# K of DeepSeek-R1's products at TP8, N narrow enough to be interpreted
@pytest.mark.parametrize(
    ("n", "k", "ms"),
    [(70, 512, range(1, 64)), (129, 2304, (1, 2, 15, 16, 17, 33, 63)), (70, 7168, (1, 16, 17, 32, 33))],
    ids=["512", "2304", "7168"],
)
def test_a_row_has_one_result_for_every_number_of_rows(n, k, ms):
    data, scale, weight, weight_scale = factors(64, n, k, QuantSpec())
    whole = interpreter.call(parts_of, data, scale, weight, weight_scale).unflatten(0, (-1, 64))
    for m in ms:
        some = interpreter.call(parts_of, data[:m], scale[:m], weight, weight_scale).unflatten(0, (-1, m))
        assert_bitwise([some.contiguous()], [whole[:, :m].contiguous()])
    one = interpreter.call(parts_of, data[40:41], scale[40:41], weight, weight_scale).unflatten(0, (-1, 1))
    assert_bitwise([one.contiguous()], [whole[:, 40:41].contiguous()])


def outliers(m: int, k: int) -> torch.Tensor:
    x = activations(m, k)
    x[:, ::97] *= 300.0
    return x


def wide(m: int, k: int) -> torch.Tensor:
    """Rows whose groups differ by a factor of 10**6."""
    return (activations(m, k).float() * torch.logspace(-3, 3, k)).bfloat16()


@pytest.mark.parametrize("make", [activations, outliers, wide])
@pytest.mark.parametrize("spec", [QuantSpec(), QuantSpec(scale="ue8m0")], ids=["fp32", "ue8m0"])
@pytest.mark.parametrize(("n", "k"), [(300, 7168), (192, 1536)])
def test_the_error_is_not_above_that_of_the_dequantized_product(n, k, spec, make):
    data, scale = reference.group_quant(make(16, k), spec)
    weight, weight_scale = quantize_weight(weight_of(n, k))
    a = data.double() * scale.double().repeat_interleave(128, 1)
    w = weight.double() * weight_scale.double().repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)
    exact = a @ w.t()

    def error(out: torch.Tensor) -> float:
        return float((out.double() - exact).norm() / exact.norm())

    args = data, scale, weight, weight_scale
    assert error(split_product(*args, torch.float32)) <= 1.05 * error(dequantized_linear(*args, torch.float32)) + 1e-8
    ours, today = (error(f(*args, torch.bfloat16)) for f in (split_product, dequantized_linear))
    assert ours <= today * 1.001


def launch(m: int, n: int, k: int, config: ProductConfig | None = None, gap: int = 0) -> None:
    fp8 = torch.float8_e4m3fn
    data, weight = torch.empty(m, k + gap, dtype=fp8)[:, :k], torch.empty(n, k, dtype=fp8)
    block_fp8_linear(data, torch.empty(k // 128, m).t(), weight, torch.empty(-(-n // 128), k // 128), config)


def code_of(capability, *args) -> Code:
    return machine_code(lambda: launch(*args), capability)


MMA = {SM_90: "QGMMA", SM_100: "UTCQMMA"}  # of a warp group, and of the tensor memory


@pytest.mark.parametrize("capability", MMA, ids=["sm_90", "sm_100"])
@pytest.mark.parametrize(
    ("m", "config"),
    [
        (1, ProductConfig()),
        (16, ProductConfig(release="waited")),
        (32, ProductConfig(columns=128)),
        (64, ProductConfig()),
        (64, ProductConfig(8, 128, 6, "loaded")),
    ],
    ids=str,
)
def test_machine_code(m, config, capability):
    code = code_of(capability, m, 2112, 7168, config)
    assert (code.stack, code.local) == (0, 0) and not code.places("LDL") and not code.places("STL")
    assert code.registers * code.threads <= 65536
    assert code.options.shared <= 227 * 1024
    assert code.places(MMA[capability]), "fp8 is multiplied as fp8"
    waits, copies = code.places("ACQBULK"), code.places("LDGSTS")
    assert len(waits) == 1 and waits[0] < copies[0]
    assert all(".128" in code.sass[at] or ".64" in code.sass[at] for at in copies[:1])
    wide = [at for at in copies if ".128" in code.sass[at]]
    assert len(wide) * code.threads * 16 >= (config.stages - 1) * config.columns * 128, (
        "a weight's stages are in flight"
    )
    assert not code.places("LDG"), "nothing is waited for that a copy could bring"
    releases, stores = code.places("PREEXIT"), code.places("STG")
    assert len(releases) == 1 and releases[0] < stores[0] and (releases[0] < waits[0]) == (config.release == "start")
    assert {w for w in code.widths("STG")} == {128}


def test_the_tensor_core_gets_one_instruction_for_every_config():
    # Others would add the 128 products of a block in another order: a config must not change a bit.
    shapes = set()
    for config in (ProductConfig(), ProductConfig(8, 128)):
        code = code_of(SM_90, 1, 2112, 7168, config)
        shapes |= {code.sass[at].split("QGMMA")[1].split()[0] for at in code.places("QGMMA")}
    assert shapes == {".64x16x32.F32.E4M3.E4M3"}


def test_rows_that_are_not_aligned_are_right_and_slow():
    code = code_of(SM_90, 4, 2112, 7168, ProductConfig(), 3)
    assert (code.stack, code.local) == (0, 0) and code.places("QGMMA")


def test_one_binary_for_few_rows():
    with compiling(SM_90) as kernels:
        for m, gap in ((1, 0), (2, 16), (15, 512), (16, 8192)):
            launch(m, 2112, 1536, ProductConfig(), gap)
    assert len(kernels) == 4 and len(set(map(id, kernels))) == 1
