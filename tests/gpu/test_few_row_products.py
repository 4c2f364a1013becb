"""Products of few rows, split over K, on a GPU: their error, one result for a row, kernels that add partial sums."""

import itertools

import pytest
import torch
from shared.compare import assert_bitwise
from shared.inputs import activations
from shared.linear_weights import weight_of

import normquant as nq
from normquant import QuantSpec, reference
from normquant.bench.products import ProductInputs, error_of
from normquant.kernels.block_fp8_linear import block_fp8_linear
from normquant.kernels.product_configs import ProductConfig, blocks_of_part, split_of
from normquant.linear import PAIRS, quantize_weight
from normquant.linear.product import scaled_product
from normquant.linear.split_product import launch_pair, launch_product
from normquant.ops import OPS, Examples

SPEC = QuantSpec(layout="col_tma")
DEEPSEEK_R1 = [(7168, 2112), (1536, 3072), (2048, 7168), (7168, 4608), (2304, 7168)]  # K, N of one GPU of eight
OTHERS = [(5120, 1280), (8192, 7168), (384, 300), (1664, 70), (256, 16)]
CONFIGS = [ProductConfig(*c) for c in itertools.product((4, 8), (64, 128), (1, 3, 6))]
CONFIGS += [ProductConfig(release=release) for release in ("waited", "loaded")]


def factors(m, k, n, spec=SPEC, x=None):
    """data [m, k], its scale, weight [n, k], its scale."""
    q = nq.group_quant((activations(m, k) if x is None else x).cuda(), spec=spec)
    return q.data, q.scale, *(t.cuda() for t in quantize_weight(weight_of(n, k)))


def product(args, dtype=torch.bfloat16):
    return launch_product(*args, dtype)(*args)[0]


def error(multiply, args):
    """Of a product, against float64, as the bench has it."""
    data, scale, *weight = args
    return error_of(multiply, ProductInputs(data, scale, (tuple(weight),), ()))


def outliers(m, k):
    """One value of each group is 500 times the others, and the rows' sizes span three orders of magnitude."""
    x = activations(m, k).float()
    x[:, 5::128] *= 500
    return (x * torch.exp2(torch.arange(m) % 10)[:, None]).bfloat16()


@pytest.mark.parametrize(("k", "n"), DEEPSEEK_R1 + OTHERS)
@pytest.mark.parametrize("rows", [activations, outliers])
@pytest.mark.parametrize("scale", ["fp32", "ue8m0"])
def test_the_error_is_little_more_than_that_of_rounding_the_result(k, n, rows, scale):
    data, x_scale, weight, weight_scale = args = factors(64, k, n, SPEC.replace(scale=scale), rows(64, k))
    ours = error(lambda *tensors: product(tensors), args)
    if rows is activations:
        assert ours <= 1.1 * error(reference_product, args)
    # With outliers the tensor core's own sums of 128 count, too; scaled_mm has the same, and takes N in sixteens.
    whole = torch.cat([weight, weight.new_zeros(-n % 16, k)])
    assert ours <= 1.02 * error(
        lambda *tensors: scaled_product(*tensors, torch.bfloat16), (data, x_scale, whole, weight_scale)
    )


def reference_product(*args):
    """What the reference gives: exact sums of 128 products, added in fp32 in the kernel's order."""
    (_, k), (n, _) = args[0].shape, args[2].shape
    return reference.sum_of_parts(reference.block_fp8_linear(*args, blocks_of_part(k, split_of(k, n))), torch.bfloat16)


@pytest.mark.parametrize(("k", "n"), DEEPSEEK_R1 + OTHERS)
def test_a_row_has_one_result_for_every_number_of_rows(k, n):
    data, scale, weight, weight_scale = factors(64, k, n, QuantSpec())
    whole = product((data, scale, weight, weight_scale))
    for m in range(1, 65):
        assert_bitwise([product((data[:m], scale[:m], weight, weight_scale))], [whole[:m]])
    assert_bitwise([product((data[63:], scale[63:], weight, weight_scale))], [whole[63:]])


@pytest.mark.parametrize("m", [1, 17, 64])
def test_configs_and_runs_change_no_bit(m):
    args = factors(m, 2304, 7168)
    plain = block_fp8_linear(*args)
    for config in CONFIGS:
        assert_bitwise([block_fp8_linear(*args, config)], [plain])
    for _ in range(50):
        assert_bitwise([block_fp8_linear(*args)], [plain])


def test_strides_and_unaligned_memory_change_no_bit():
    data, scale, weight, weight_scale = factors(9, 1536, 3072)
    plain = product((data, scale, weight, weight_scale))
    memory = torch.empty(weight.numel() + 3, dtype=torch.uint8, device="cuda")
    shifted = memory[3:].view(weight.dtype).view(weight.shape).copy_(weight)
    wide = torch.empty(9, 1536 + 3, dtype=torch.uint8, device="cuda").view(data.dtype)[:, :1536].copy_(data)
    for given in ((wide, scale, weight), (data, scale, shifted), (data, scale.contiguous(), weight)):
        assert_bitwise([product((*given, weight_scale))], [plain])


def test_a_nan_stays_in_its_column_and_its_block():
    data, scale, weight, weight_scale = factors(3, 384, 300)
    weight.view(torch.uint8)[7, 130] = 0x7F
    weight_scale[1, 2] = float("nan")
    nan = product((data, scale, weight, weight_scale)).isnan()
    assert nan[:, 7].all() and nan[:, 128:256].all() and not nan[:, :7].any() and not nan[:, 8:128].any()
    assert not nan[:, 256:].any()


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_pair_gives_what_its_two_halves_give(name, dtype):
    for m in (0, 1, 5, 16, 33, 64):
        k = 128 if "latent" in name else 1920  # whole heads of 192
        example = OPS[name].example(Examples(m, k, "cuda", dtype, torch.bfloat16))
        n = example.pop("x").shape[1]
        args = factors(m, 1536, n)
        rest = (*example.values(), SPEC)
        apart = OPS[name].overload(product(args, dtype), *rest[:-1], SPEC.encode())
        others = [value for value in rest if isinstance(value, torch.Tensor)]
        together = launch_pair(OPS[name], (*args, dtype), rest)(*args, *others)
        assert_bitwise(together, [apart] if isinstance(apart, torch.Tensor) else list(apart))
        given = PAIRS[name].overload(*args, dtype, "always", "", *rest[:-1], SPEC.encode())
        assert_bitwise(together, [given] if isinstance(given, torch.Tensor) else list(given))


def test_a_pair_in_a_captured_graph():
    example = OPS["add_rms_norm_quant"].example(Examples(16, 7168, "cuda"))
    rest = [value for name, value in example.items() if name != "x"]
    call = (*factors(16, 2304, 7168), torch.bfloat16, "always", "", *rest, SPEC.encode())
    expected = PAIRS["add_rms_norm_quant"].overload(*call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):  # the next product is launched while the norm before it still runs
            outputs = PAIRS["add_rms_norm_quant"].overload(*call)
    for _ in range(20):
        graph.replay()
    assert_bitwise(list(outputs), list(expected))
