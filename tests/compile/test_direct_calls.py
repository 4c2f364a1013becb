"""How generated code calls an op: its launcher on CUDA, the op itself everywhere else."""

from __future__ import annotations

import re

import pytest
import torch
from shared.clean_graphs import BF16, empty
from torch._inductor.utils import run_and_get_code

import normquant as nq
from normquant.audit.capture.live_compile import capture
from normquant.compile import inductor_options

OPTIONS = inductor_options("always", strict=True)


def five_ops(x, residual, weight):
    """Five ops, one of them as its variant."""
    alone, added = nq.rms_norm_quant(x, weight, 1e-6), nq.add_rms_norm_quant(x, residual, weight, 1e-6)
    normed = nq.rms_norm_quant(x, weight, 1e-6, return_norm=True)
    gated, lone = nq.silu_mul_quant(x), nq.group_quant(x)
    return [*normed[1:], added[1], *(one.data for one in (alone, added[0], normed[0], gated, lone))]


def inputs() -> tuple[torch.Tensor, ...]:
    return empty(8, 512), empty(8, 512), empty(512)


def generated(**options) -> str:
    (code,) = capture(five_ops, inputs, options={**OPTIONS, **options})
    return code.text


def test_code_for_a_gpu_calls_the_launcher() -> None:
    calls = re.findall(r"= torch\.ops\.normquant\.(\w+)\.default(\.launch)?\(", generated())
    assert {name for name, _ in calls} == {
        "add_rms_norm_quant", "group_quant", "rms_norm_quant", "rms_norm_quant_with_norm", "silu_mul_quant",
    }  # fmt: skip
    assert all(launch for _, launch in calls)


def product_and_reader(data, scale, weight, by):
    x = torch.ops.normquant.block_fp8_linear(data, scale, weight, by, BF16)
    y = torch.ops.normquant.block_fp8_linear(data, scale, weight, by, BF16)
    return nq.silu_mul_quant(x).data, y  # which is left alone


def test_products_and_pairs_are_launched_too() -> None:
    fp8 = torch.float8_e4m3fn
    options = inductor_options("always", products="always", strict=True)
    (code,) = capture(
        product_and_reader,
        lambda: (empty(8, 512).to(fp8), empty(8, 4).float(), empty(768, 512).to(fp8), empty(6, 4).float()),
        options=options,
    )
    assert re.findall(r"= torch\.ops\.normquant\.(\w+)\.default(\.launch)?\(", code.text) == [
        ("block_fp8_linear_silu_mul_quant", ".launch"), ("block_fp8_linear", ".launch"),
    ]  # fmt: skip


def test_the_auditor_reads_such_a_call_as_the_op() -> None:
    report = nq.audit(five_ops, inputs, options=OPTIONS)
    assert report.externs["normquant.add_rms_norm_quant"] == 1


@pytest.mark.parametrize("more", [{}, {"cpp_wrapper": True}])
def test_code_for_a_cpu_calls_the_op(more: dict) -> None:
    x = torch.randn(8, 512).to(BF16)
    with torch.no_grad():
        compiled = torch.compile(lambda x: nq.group_quant(x).data, options={**OPTIONS, **more})
        given, sources = run_and_get_code(compiled, x)
    assert torch.equal(given, nq.group_quant(x).data)
    assert not any(".launch(" in text for text in sources)
