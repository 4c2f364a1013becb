"""Products whose partial sums the next kernel adds: the pairs as ops on CPU, and their kernels interpreted."""

import pytest
import torch
from shared import interpreter
from shared.compare import assert_bitwise, bits
from shared.inputs import awkward
from shared.products import factors, pair_of

import normquant.vllm.fp8_linear  # noqa: F401  # defines the operator of vLLM's products
from normquant import QuantSpec, reference, specs
from normquant.linear import PAIRS, dequantized_linear
from normquant.linear.split_product import split_product
from normquant.ops import OPS, Examples, Op

K = 1280  # 10 blocks: several parts for every N here
NARROW = {"latent_norm_quant": 128, "latent_norm_quant_with_kv": 128}
SPEC = QuantSpec(layout="col_tma")


def arguments(name, m, *, wanted="always", spec=SPEC, dtype=torch.bfloat16, x=None, limit=None):
    """Arguments of a pair, the spec decoded: the op's own, with a product of as many columns as x has in place of x."""
    k = NARROW.get(name, 384)
    example = OPS[name].example(Examples(m, k, "cpu", dtype, torch.bfloat16, latent=(128, 64), limit=limit))
    n = example.pop("x").shape[1]
    return (*factors(m, n, K, x=x), dtype, wanted, "", *example.values(), spec)


def encoded(args):
    return (*args[:-1], args[-1].encode())


def by_hand(name, args, multiply=split_product):
    outputs = OPS[name].reference(multiply(*args[:5]), *args[7:])
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


def called(name, args):
    outputs = PAIRS[name].overload(*encoded(args))
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


def test_every_op_that_takes_rows_has_a_pair():
    assert PAIRS.keys() == OPS.keys()


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("m", [0, 1, 5])
def test_the_kernels_give_the_reference(name, m):
    args = arguments(name, m)
    assert_bitwise(interpreter.call(pair_of, name, *args), by_hand(name, args))


@pytest.mark.parametrize("name", ["add_rms_norm_quant_with_norm", "silu_mul_quant", "rope_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_awkward_rows_in_both_dtypes(name, dtype):
    args = arguments(name, 9, dtype=dtype, x=awkward(9, K))
    assert_bitwise(interpreter.call(pair_of, name, *args), by_hand(name, args))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_is_rounded_before_it_is_clamped(dtype):
    args = arguments("silu_mul_quant", 9, dtype=dtype, x=awkward(9, K), limit=7.3)
    assert_bitwise(interpreter.call(pair_of, "silu_mul_quant", *args), by_hand("silu_mul_quant", args))
    assert_bitwise(called("silu_mul_quant", args), by_hand("silu_mul_quant", args))
    plain = by_hand("silu_mul_quant", arguments("silu_mul_quant", 9, dtype=dtype, x=awkward(9, K)))
    assert not torch.equal(bits(plain[0]), bits(by_hand("silu_mul_quant", args)[0]))


@pytest.mark.parametrize("spec", [specs.HF, specs.VLLM_UE8M0, specs.DEEPGEMM_PACKED, specs.AITER], ids=str)
@pytest.mark.parametrize("name", ["add_rms_norm_quant", "silu_mul_quant", "group_quant"])
def test_specs(name, spec):
    args = arguments(name, 5, spec=spec)
    assert_bitwise(interpreter.call(pair_of, name, *args), by_hand(name, args))


@pytest.mark.parametrize("name", PAIRS)
def test_the_op_on_a_cpu(name):
    for m in (0, 3, 64):
        always = arguments(name, m)
        assert_bitwise(called(name, always), by_hand(name, always))
    for args in (arguments(name, 3, wanted="auto"), arguments(name, 65)):  # nothing measured, too many rows
        assert_bitwise(called(name, args), by_hand(name, args, dequantized_linear))


@pytest.mark.parametrize("name", PAIRS)
def test_a_row_has_one_result(name):
    whole = called(name, arguments(name, 64))
    for m in (1, 7, 33):
        args = list(arguments(name, 64))
        rows = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and i not in (2, 3) and a.shape[0] == 64]
        for i in rows:
            args[i] = args[i][:m]
        for some, all_rows in zip(called(name, tuple(args)), whole, strict=True):
            assert torch.equal(bits(some), bits(all_rows[:m]))


CHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("name", ["add_rms_norm_quant_with_norm", "silu_mul_quant", "latent_norm_quant_with_kv"])
@pytest.mark.parametrize("m", [0, 1, 5])
def test_opcheck(name, m):
    torch.library.opcheck(PAIRS[name].overload, encoded(arguments(name, m)), test_utils=CHECKS)


def test_one_graph_for_every_number_of_rows():
    compiles = []

    def backend(graph, inputs):
        compiles.append(graph)
        return graph

    call = torch.compile(lambda *args: PAIRS["silu_mul_quant"].overload(*args), backend=backend, dynamic=True)
    for m in (2, 3, 17, 64, 65, 200):  # over the limit of split products, too
        args = arguments("silu_mul_quant", m, spec=QuantSpec())
        assert_bitwise(call(*encoded(args)), called("silu_mul_quant", args))
    assert len(compiles) == 1


DATA, SCALE, WEIGHT, WEIGHT_SCALE, *REST = arguments("silu_mul_quant", 5)
BAD = {
    "e5m2 weight": ((DATA, SCALE, WEIGHT.view(torch.float8_e5m2), WEIGHT_SCALE, *REST), "float8_e5m2", "float8_e4m3fn"),
    "scale of other M": ((DATA, SCALE[:4], WEIGHT, WEIGHT_SCALE, *REST), "(4, 10)", "(5, 10)"),
    "scale of other N": ((DATA, SCALE, WEIGHT, WEIGHT_SCALE[:2], *REST), "(2, 10)", "(6, 10)"),
    "fp32 rows": ((DATA, SCALE, WEIGHT, WEIGHT_SCALE, torch.float32, *REST[1:]), "float32", "bfloat16, float16"),
    "unknown choice": ((DATA, SCALE, WEIGHT, WEIGHT_SCALE, REST[0], "never", *REST[2:]), "'never'", "'auto', 'always'"),
    "unknown product": (
        (DATA, SCALE, WEIGHT, WEIGHT_SCALE, *REST[:2], "normquant_vllm::none 1", *REST[3:]),
        "'normquant_vllm::none 1'",
        "normquant_vllm::none is not defined in this process",
    ),
    "limit = 0": ((DATA, SCALE, WEIGHT, WEIGHT_SCALE, *REST[:3], 0.0, REST[4]), "limit is 0.0", "positive"),
    "odd halves": ((DATA, SCALE, WEIGHT[:640], WEIGHT_SCALE[:5], *REST), "640 columns", "128"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_inputs(name):
    args, given, accepted = BAD[name]
    with pytest.raises(ValueError) as error:
        PAIRS["silu_mul_quant"].overload(*encoded(args))
    assert given in str(error.value) and accepted in str(error.value), str(error.value)


def test_a_lost_gradient_is_refused():
    args = arguments("add_rms_norm_quant", 3)
    residual = args[7].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="has no gradient"):
        PAIRS["add_rms_norm_quant"].overload(*encoded((*args[:7], residual, *args[8:])))


@pytest.mark.parametrize("otherwise", ["", "normquant_vllm::block_fp8_linear 32 1"])
def test_a_product_that_is_not_split_calls_implementations_and_no_dispatcher(otherwise, monkeypatch):
    args = arguments("silu_mul_quant", 5, wanted="auto")
    product = torch.ops.normquant.block_fp8_linear.default
    if otherwise:
        product = torch.ops.normquant_vllm.block_fp8_linear.default
    given, planned = [], []

    def multiply(data, scale, weight, weight_scale, *own):
        given.append(own)
        return split_product(data, scale, weight, weight_scale, torch.bfloat16)

    def planned_for(op, x, limit, spec):
        planned.append(op.name)
        return lambda x: list(op.reference(x, limit, QuantSpec.decode(spec)))

    monkeypatch.setattr(product, "launch", multiply)
    monkeypatch.setattr(Op, "launch", planned_for)
    launch = PAIRS["silu_mul_quant"].launcher(*encoded((*args[:6], otherwise, *args[7:])))
    for _ in range(2):
        assert_bitwise(launch(*args[:4]), by_hand("silu_mul_quant", args))
    assert given == [(32, True) if otherwise else (torch.bfloat16,)] * 2
    assert planned == ["silu_mul_quant"], "the op's launch is the same for every call"


def test_inputs_stay_as_they_are():
    args = arguments("add_rms_norm_quant", 3)
    before = [bits(a).clone() for a in args if isinstance(a, torch.Tensor)]
    called("add_rms_norm_quant", args)
    after = [bits(a) for a in args if isinstance(a, torch.Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_reader_sees_what_the_product_alone_gives():
    args = arguments("group_quant", 5)
    x = split_product(*args[:5])
    assert x.dtype == torch.bfloat16
    assert_bitwise(interpreter.call(pair_of, "group_quant", *args), list(reference.group_quant(x, SPEC)))
