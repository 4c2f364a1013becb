"""Reading a kernel's text: what it loads and stores."""

from __future__ import annotations

import pytest
from shared.clean_graphs import F32, add_norm_quant, empty
from shared.generated_code import module, program
from torch._inductor import config

from normquant.audit import audit
from normquant.audit.source import kernel_code
from normquant.audit.source.index_reach import distinct


def test_loads_under_a_condition_count_what_it_lets_through() -> None:
    (kernel,) = program(
        module("tmp0 = tl.load(in_ptr0 + (xindex), (x0 < 32) & xmask, other=0.0)\ntmp1 = tmp0 + 1")
    ).kernels
    assert kernel.bytes_read == 64 * 32 * 2


def test_passes_over_a_row_are_counted() -> None:
    loop = "for r0_offset in tl.range(0, r0_numel, R0_BLOCK):\n    tmp0 = tl.load(in_ptr0 + (xindex), xmask)\n"
    (kernel,) = program(module(loop + loop + "tl.store(out_ptr0 + (xindex), tmp0, xmask)")).kernels
    assert [(access.bytes, access.loads) for access in kernel.reads] == [(4096 * 2, 2)]


SHARED_BODY = """
@triton_heuristics.foreach(
    num_warps=8,
    triton_meta={'signature': {'in_ptr0': '*bf16', 'in_ptr1': '*bf16', 'out_ptr0': '*bf16', 'out_ptr1': '*bf16'}},
    inductor_meta={'mutated_arg_names': []},
)
@triton.jit
def triton_for_fused_0(in_ptr0, in_ptr1, out_ptr0, out_ptr1):
    pid = tl.program_id(0)
    XBLOCK: tl.constexpr = 1024
    num_xblocks_0 = tl.cdiv(64, XBLOCK)
    num_xblocks_1 = num_xblocks_0 + tl.cdiv(128, XBLOCK)
    if pid < num_xblocks_0:
        pid_offset = pid
        xnumel = 64
        foreach_arg0 = in_ptr0
        foreach_arg1 = out_ptr0
    elif pid < num_xblocks_1:
        pid_offset = pid - num_xblocks_0
        xnumel = 128
        foreach_arg0 = in_ptr1
        foreach_arg1 = out_ptr1
    else:
        pid_offset = 0
        xnumel = 0
        foreach_arg0 = in_ptr0
        foreach_arg1 = out_ptr0
    xoffset = pid_offset * XBLOCK
    xindex = xoffset + tl.arange(0, XBLOCK)[:]
    xmask = xindex < xnumel
    x0 = xindex
    tmp0 = tl.load(foreach_arg0 + (x0), xmask).to(tl.float32)
    tl.store(foreach_arg1 + (x0), tmp0 * 2, xmask)
"""


def test_kernels_of_a_foreach_that_share_one_body() -> None:
    """As torch 2.14 writes them."""
    ops = kernel_code.read_memory_ops(kernel_code.read_kernel(SHARED_BODY), {})
    assert [(op.pointer, distinct(op.index.digits, op.bounds)) for op in ops.loads] == [
        ("in_ptr0", 64), ("in_ptr1", 128),
    ]  # fmt: skip
    assert [(s.op.pointer, distinct(s.op.index.digits, s.op.bounds)) for s in ops.stores] == [
        ("out_ptr0", 64), ("out_ptr1", 128),
    ]  # fmt: skip


@pytest.mark.skipif(not hasattr(config.triton, "nested_reduction"), reason="this torch does not nest reductions")
@pytest.mark.parametrize("k", [1024, 7168], ids=["persistent", "looped"])
def test_a_nested_reduction_writes_a_scale_per_group(k: int) -> None:
    """One kernel reduces over the row, and within it over groups of 128: its group index is a part of the row index."""
    m = 64
    report = audit(
        add_norm_quant, lambda: (empty(m, k), empty(m, k), empty(k)), options={"triton.nested_reduction": True}
    )
    (kernel,) = report.kernels
    written = {access.bytes for access in kernel.writes}
    assert "reduced_r0_index" in report.source
    assert written == {m * k * 2, m * k, m * k // 128 * F32.itemsize}, "the sum, the fp8 values and the scales"
    assert report.to_dict()["notes"] == []
