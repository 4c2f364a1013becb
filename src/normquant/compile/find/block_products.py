"""Block-FP8 products of a graph: ours, and vLLM's, which write into a tensor that they are given.

    normquant::block_fp8_linear(data, scale, weight, weight_scale, dtype)
    normquant_vllm::block_fp8_linear(data, scale, weight, weight_scale, below, e8m0)   what `fusions.vllm_linear` makes
    vllm::fp8_gemm_nt_op(data, scale, weight, weight_scale, output, e8m0)              DeepGEMM alone
    _C::cutlass_scaled_mm(out, data, weight.T, scale, weight_scale.T, bias)            Cutlass

data [M, K] fp8, scale [M, K/128], weight [N, K] fp8 and weight_scale [ceil(N/128), K/128] are those of the graph.
Whether their layouts and dtypes are accepted is for the op that takes them to say.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from normquant.compile.find.graph import (
    PERMUTES,
    RESHAPES,
    Unsupported,
    arguments,
    first_arg,
    is_call,
    overload_name,
    peel,
    value,
)
from normquant.compile.find.quant_ops import DEEPGEMM, functionalized, mutated

OURS = "normquant::block_fp8_linear"
VLLM = "normquant_vllm::block_fp8_linear"  # FlashInfer's kernel below a number of rows, DeepGEMM from there on
CUTLASS = "_C::cutlass_scaled_mm"
VLLM_CUTLASS = "normquant_vllm::cutlass_block_fp8_linear"


@dataclass(frozen=True)
class Product:
    """One product.

    node: its result [M, N]. tensors: data, scale, weight, weight_scale. otherwise: the operator, as a pair takes it.
    refused: why no other kernel can take these tensors; "" where one can.
    """

    node: Node
    tensors: tuple[Node, ...]
    dtype: torch.dtype
    otherwise: str
    refused: str = ""

    @property
    def k(self) -> int:
        return value(self.tensors[0]).shape[1]

    @property
    def columns(self) -> int:
        return value(self.node).shape[1]


def product_of(x: Any) -> Product | None:
    """The product that rows x come from by way of views."""
    node = peel(x, lambda n: is_call(n, *RESHAPES)) if isinstance(x, Node) else x
    if not isinstance(node, Node):
        return None
    if is_call(node, operator.getitem):
        call = first_arg(node)
        name, written = WRITTEN.get(functionalized(call), ("", None))
        return written(node, call.kwargs) if written is not None and _writes(call, name, node) else None
    read = RETURNED.get(overload_name(node.target))
    return None if read is None else read(node)


def _ours(node: Node) -> Product:
    *tensors, dtype = arguments(node)
    return Product(node, tuple(tensors), dtype, "")


def _vllm(node: Node) -> Product:
    *tensors, below, e8m0 = arguments(node)
    return Product(node, tuple(tensors), torch.bfloat16, f"{VLLM} {below} {int(e8m0)}")


def _deepgemm(node: Node, given: Mapping[str, Any]) -> Product:
    tensors = tuple(given[name] for name in ("q_input", "input_scale", "weight", "weight_scale"))
    return Product(node, tensors, value(node).dtype, f"{VLLM} 0 {int(given['use_deep_gemm_e8m0'])}")


def _cutlass(node: Node, given: Mapping[str, Any]) -> Product:
    weight, scale = (_transposed(given[name]) for name in ("b", "b_scales"))
    refused = "the product adds a bias" if given.get("bias") is not None else ""
    if weight is None or scale is None:
        refused = "the weight or its scales are no transposes of [N, K] and of [N/128, K/128]"
    tensors = (given["a"], given["a_scales"], weight or given["b"], scale or given["b_scales"])
    dtype = value(node).dtype
    return Product(node, tensors, dtype, f"{VLLM_CUTLASS} {int(dtype == torch.float16)}", refused)


def _transposed(node: Node) -> Node | None:
    """What a node [B, A] is the transpose of, [A, B]; None where it is none."""
    if not is_call(node, *PERMUTES):
        return None
    view, source = value(node), value(first_arg(node))
    swapped = (source.dim(), view.shape, view.stride()) == (2, source.shape[::-1], source.stride()[::-1])
    return first_arg(node) if swapped else None


def _writes(call: Node, name: str, node: Node) -> bool:
    """Whether node holds what an auto_functionalized call has written as its argument `name`."""
    try:
        return mutated(call, name)[0] is node
    except Unsupported:  # a part of a tensor
        return False


RETURNED: dict[str, Callable[[Node], Product]] = {OURS: _ours, VLLM: _vllm}
# operation -> the argument that it writes, and what reads a call
WRITTEN: dict[str, tuple[str, Callable[[Node, Mapping[str, Any]], Product]]] = {
    DEEPGEMM: ("output", _deepgemm),
    CUTLASS: ("out", _cutlass),
}
