"""Rules about traffic: on a graph that has what they look for, and on the nearest that has not."""

from __future__ import annotations

import torch
from shared.clean_graphs import empty, quantize, rms_norm
from shared.rule_cases import K, M, attend, check, found, kernel, program, rows

from normquant.audit import AuditReport, audit
from normquant.audit.program import Access, Extern


def test_opaque_boundary() -> None:
    def quantized(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.ops.opaque_ops.group_quant(rms_norm(x, w))

    def inputs() -> tuple[torch.Tensor, ...]:
        return empty(M, K), empty(K)

    report = audit(quantized, inputs)
    assert found(report, "opaque-boundary") == [("opaque_ops.group_quant", 2 * M * K * 2)]
    kept = audit(lambda x, w: (torch.ops.opaque_ops.group_quant(y := rms_norm(x, w)), y), inputs)
    assert found(kept, "opaque-boundary") == [("opaque_ops.group_quant", M * K * 2)], "the norm is needed anyway"
    fused = audit(lambda x, w: quantize(rms_norm(x, w)), inputs)
    assert fused.count("opaque-boundary") == 0
    assert audit(lambda x, w: attend(rms_norm(x, w)), inputs).count("opaque-boundary") == 0, "not row-wise by its name"


def test_unfused_neighbours_say_why() -> None:
    def norm_then_quantize(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return quantize(rms_norm(x + r, w))

    report = audit(norm_then_quantize, lambda: (empty(M, 7168), empty(M, 7168), empty(7168)))
    (finding,) = [f for f in report.findings if f.rule == "unfused-neighbours"]
    assert "Inductor did not fuse them: numel/rnumel mismatch" in finding.message
    assert finding.bytes == 2 * M * 4  # the mean of the squares, there and back; both read the inputs: see reread
    assert audit(lambda x: x.float().sum(0), lambda: (empty(4096, 1024),)).count("unfused-neighbours") == 0


def test_reread() -> None:
    looped = audit(lambda x: x.softmax(-1), lambda: (empty(M, 5000),))
    assert found(looped, "reread") == [(looped.kernels[0].name, M * 5000 * 2)]
    assert looped.wasted_bytes == 0, "the second pass may be in the cache: a note"
    assert audit(lambda x: x.softmax(-1), rows).count("reread") == 0, "a row that fits is loaded once"


def test_fp32_spill() -> None:
    n = M * K
    first = kernel(0, {"x": 2 * n}, {"wide": 4 * n})
    second = kernel(1, {"wide": 4 * n}, {"out": 2 * n})
    assert check(program(first, second, wide="float32"))["fp32-spill"] == [("triton_0", 4 * n)]
    assert "fp32-spill" not in check(program(first, second, wide="float32", outputs=("out", "wide"))), "it is a result"
    statistics = kernel(0, {"x": 2 * n}, {"mean": 4 * M})
    assert "fp32-spill" not in check(program(statistics, kernel(1, {"mean": 4 * M}, {"out": 2 * n}), mean="float32"))


def test_reread_by_neighbours_but_not_across_an_opaque_call() -> None:
    n = M * K
    first, second = kernel(0, {"x": 2 * n}, {"a": 2 * n}), kernel(1, {"x": 2 * n}, {"out": 2 * n})
    assert check(program(first, second))["reread"] == [("triton_1", 2 * n)]
    gemm = Extern(1, "aten.mm", (Access("a", 2 * n),), (Access("b", 2 * n),))
    add = kernel(2, {"x": 2 * n, "b": 2 * n}, {"out": 2 * n})
    assert "reread" not in check(program(first, gemm, add)), "the second needs what the call makes of the first"


def test_without_the_fusion_the_neighbours_are_found_with_their_bytes(off: AuditReport) -> None:
    found = [(f.buffer, f.bytes) for f in off.findings if f.rule == "opaque-boundary"]
    assert found == [("buf11", 2 * M * 7168 * 2), ("buf30", 2 * M * 7168 * 2), ("buf40", 2 * M * 1536 * 2)]
    assert off.count("unfused-neighbours") == 1
