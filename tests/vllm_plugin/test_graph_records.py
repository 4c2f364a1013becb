"""Which linear kernels a graph calls: known by the name of vLLM's operation, called as it is or functionalized."""

from __future__ import annotations

import torch
from shared import vllm_fused_stand_ins as vllm_fused_stand_ins  # defines vLLM's operations
from torch.fx import Graph

from normquant.linear import PAIRS
from normquant.vllm.graph_records import PAIRED, SELF_QUANTIZING, linear_kernels, remark


def test_kernels_are_counted_by_name() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    functionalized = torch.ops.higher_order.auto_functionalized
    gemm = torch.ops.vllm.fp8_gemm_nt_op.default
    tensors = {name: x for name in ("q_input", "input_scale", "weight", "weight_scale", "output")}
    for _ in range(2):
        graph.call_function(functionalized, (gemm,), {**tensors, "use_deep_gemm_e8m0": True})
    inside = graph.call_function(torch.ops.vllm.flashinfer_fp8_blockscale_gemm.default, (x, x, x))
    graph.call_function(torch.ops.aten.mm.default, (inside, x))
    graph.call_function(PAIRS["silu_mul_quant"].overload, (x,))
    graph.output(inside)
    assert linear_kernels(graph) == {"DeepGEMM": 2, "FlashInfer": 1, PAIRED: 1}


def test_a_kernel_that_quantizes_inside_is_remarked() -> None:
    assert remark("FlashInfer") == SELF_QUANTIZING
    assert remark("DeepGEMM") == remark("unknown") == ""
