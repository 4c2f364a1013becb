"""Which block-FP8 linear kernels a graph of vLLM calls, and which of them quantize their own input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch.fx import Graph, Node

from normquant.compile.find.graph import arguments, overload_name

SELF_QUANTIZING = "takes bf16 and quantizes inside: nothing to fuse in front of it"
DEEPGEMM = "vllm::fp8_gemm_nt_op"

# name of vLLM's operation -> how a person calls the kernel, and what keeps it from being fused with
KERNELS: Mapping[str, tuple[str, str]] = {
    DEEPGEMM: ("DeepGEMM", ""),
    "_C::cutlass_scaled_mm": ("Cutlass", ""),
    "vllm::w8a8_triton_block_scaled_mm_func": ("Triton", ""),
    "vllm::flashinfer_fp8_blockscale_gemm": ("FlashInfer", SELF_QUANTIZING),
    "vllm::dynamic_flashinfer_deepgemm_blockscale_gemm": ("FlashInfer swapAB or DeepGEMM, by rows", SELF_QUANTIZING),
}


def linear_kernels(graph: Graph) -> dict[str, int]:
    """Name of each known linear kernel -> how many calls of it the graph has."""
    return dict(Counter(KERNELS[name][0] for name in map(_called, graph.nodes) if name in KERNELS))


def remark(kernel: str) -> str:
    """What keeps a linear kernel, named as `linear_kernels` does, from being fused with; "" when nothing does."""
    return next((note for name, note in KERNELS.values() if name == kernel), "")


def _called(node: Node) -> str:
    """`namespace::op` that a node calls, also through auto_functionalized."""
    if node.op != "call_function":
        return ""
    if getattr(node.target, "__name__", "") in ("auto_functionalized", "auto_functionalized_v2"):
        return overload_name(arguments(node)[0]) if arguments(node) else ""
    return overload_name(node.target)
