"""The kernel that adds a product's parts, interpreted on CPU, against the reference: equal to the bit."""

import pytest
import torch
from shared import interpreter
from shared.compare import assert_bitwise
from shared.products import factors, product_of

from normquant import reference
from normquant.kernels.partial_rows import PartialRows, row_stride
from normquant.linear.split_product import split_product

CPU = torch.device("cpu")


def summed(parts, rows):
    from normquant.kernels.sum_of_parts import sum_of_parts

    return sum_of_parts(parts, rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("m", "n", "parts"), [(0, 128, 2), (1, 1, 1), (3, 129, 2), (5, 2112, 8), (17, 300, 5)])
def test_added_in_their_order(m, n, parts, dtype):
    memory = torch.randn(parts * m, row_stride(n), generator=torch.Generator().manual_seed(0)) * 100
    memory[:, n:] = float("nan")  # what lies between rows is nobody's
    got = interpreter.call(summed, memory[:, :n], PartialRows(m, n, parts, dtype, CPU))
    assert_bitwise([got], [reference.sum_of_parts(memory[:, :n].reshape(parts, m, n), dtype)])


def test_special_values():
    rows = torch.tensor([[0.0, -0.0, float("inf"), float("nan"), 3.4e38, 1e-40, -0.0, 1.0]])
    parts = torch.cat((rows, rows.neg(), rows))
    got = interpreter.call(summed, parts, PartialRows(1, 8, 3, torch.bfloat16, CPU))
    assert_bitwise([got], [reference.sum_of_parts(parts.unsqueeze(1), torch.bfloat16)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_whole_product(dtype):
    args = (*factors(5, 300, 1536), dtype)
    assert_bitwise(interpreter.call(product_of, *args), [split_product(*args)])
