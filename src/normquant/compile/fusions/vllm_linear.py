"""vLLM's default block-FP8 linears on Hopper, which take bf16 and quantize inside.

    y = flashinfer_fp8_blockscale_gemm(x, w, w_scale)                             FlashInfer's kernel for any rows
    y = dynamic_flashinfer_deepgemm_blockscale_gemm(x, w, w_scale, 128, e8m0)     below 32 rows; DeepGEMM from there on

Nothing can be fused into an operator that quantizes inside. So the quantization comes out, by the rule that the kernel
has for each number of rows:

    data, scale = group_quant(x)
    y = normquant_vllm::block_fp8_linear(data, scale, w, w_scale)

The other fusions then find the quantization behind its norm, gated product or latents. One that none of them takes is a
kernel of ours in place of the one inside.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.fx import Graph, Node

from normquant.compile.edit.build import Builder, Rewrite, as_rows
from normquant.compile.find.graph import Unsupported, arguments, overload_name, value
from normquant.compile.fusions.acceptance import check_op, rows_of
from normquant.compile.fusions.candidate import (
    Candidate,
    Findings,
    Rejection,
    rejected,
    site_name,
    source_line,
)
from normquant.spec import QuantSpec
from normquant.specs import FLASHINFER_LINEAR, VLLM, VLLM_UE8M0

FLASHINFER = "vllm::flashinfer_fp8_blockscale_gemm"
FLASHINFER_OR_DEEPGEMM = "vllm::dynamic_flashinfer_deepgemm_blockscale_gemm"
PRODUCT = "normquant_vllm::block_fp8_linear"
FLASHINFER_BELOW = 32  # rows for which the second of them takes FlashInfer's kernel
EVERY_ROW = 2**31 - 1
NOTE = "was done inside the linear kernel; nothing is fused into it"


@dataclass(frozen=True)
class SelfQuantizing:
    """One call. rows_below: for fewer rows FlashInfer's kernel runs, DeepGEMM for others; e8m0: with powers of two."""

    x: Node
    weight: Node
    weight_scale: Node
    rows_below: int
    e8m0: bool

    @property
    def spec(self) -> QuantSpec:
        """How the kernel quantizes its input."""
        return input_spec(self.rows_below, self.e8m0)


def input_spec(rows_below: int, e8m0: bool) -> QuantSpec:
    """How FlashInfer's kernel quantizes inside for fewer rows than `rows_below`, and vLLM for DeepGEMM from there."""
    if rows_below == EVERY_ROW:
        return FLASHINFER_LINEAR
    return (VLLM_UE8M0 if e8m0 else VLLM).replace(layout="col_tma", few_rows=rows_below)


@dataclass(frozen=True)
class QuantizedInputs:
    """The fusion.

    lacks: says why the products cannot be given FP8 inputs here, None where they can; asked when a graph has one, since
        the answer may need a GPU. flashinfer: the version that the answer is for, part of the pass's identity.
    deepgemm_alone: whether vLLM takes DeepGEMM for any number of rows, as its batch-invariant mode does.
    """

    lacks: Callable[[], str | None] = field(default=lambda: None, repr=False, compare=False)
    flashinfer: str = ""
    deepgemm_alone: bool = False

    def __call__(self, graph: Graph) -> Findings:
        for node in list(graph.nodes):
            if node.op == "call_function" and overload_name(node.target) in (FLASHINFER, FLASHINFER_OR_DEEPGEMM):
                yield self._candidate(node)

    def _candidate(self, node: Node) -> Candidate | Rejection:
        name, where = site_name(node), source_line(node)
        found = self._read(node)
        x = value(found.x)
        reason = self.lacks() or _unsupported(found)
        if reason is not None:
            return rejected(name, where, f"{overload_name(node.target)} quantizes inside: {reason}")
        k = x.shape[-1]
        return Candidate(name, where, "group_quant", x, x.numel() // k, k, found.spec, partial(_take_out, node, found))

    def _read(self, node: Node) -> SelfQuantizing:
        args = arguments(node)
        x, weight, weight_scale = args[:3]
        if overload_name(node.target) == FLASHINFER:
            return SelfQuantizing(x, weight, weight_scale, EVERY_ROW, False)
        below = 0 if self.deepgemm_alone else FLASHINFER_BELOW
        return SelfQuantizing(x, weight, weight_scale, below, bool(args[4]))


def _unsupported(found: SelfQuantizing) -> str | None:
    """What keeps the kernels from taking an input [M, K] and a weight [N, K] of this form."""
    x, weight = value(found.x), value(found.weight)
    k = x.shape[-1]
    if x.dtype != torch.bfloat16:
        return f"its input is {str(x.dtype)[6:]}, not bfloat16"
    if not isinstance(k, int) or k % 128 or weight.shape[0] % 64:
        return f"K is {k} and N {weight.shape[0]}; FP8 inputs need multiples of 128 and of 64"
    try:
        check_op("group_quant", rows_of(found.x, k), found.spec)
    except Unsupported as reason:
        return str(reason)
    return None


def _take_out(node: Node, found: SelfQuantizing, new: Builder) -> Rewrite:
    k = value(found.x).shape[-1]
    with new.before(node):
        quantized = new(torch.ops.normquant.group_quant.default, as_rows(new, found.x, k), found.spec.encode())
        data, scale = (new(operator.getitem, quantized, i) for i in range(2))
        product: Any = torch.ops.normquant_vllm.block_fp8_linear.default
        y = new(product, data, scale, found.weight, found.weight_scale, found.rows_below, found.e8m0)
    return Rewrite(((node, y),), like=node, note=NOTE, stands_for=quantized)
