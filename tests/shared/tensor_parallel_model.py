"""A tiny DeepSeek-V3 of transformers whose heads and MLP are split over ranks, block FP8, and ways to add the parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol

from normquant import reference
from normquant.demo import deepseek_layer
from normquant.demo.deepseek_layer import Dims
from normquant.linear import block_fp8
from normquant.ops._gather import gather

# A head's rows are whole blocks of 128, so that a share of a weight has the scales that it has in the whole.
TINY = Dims(hidden=256, intermediate=512, heads=4, q_lora=128, kv_lora=128, nope=128, rope=128, v_head=128)
LAYERS = 2
Reduce = Callable[[torch.Tensor], torch.Tensor]

torch.library.define("normquant_tests::rank_order_sum", "(Tensor x, str group) -> Tensor")
torch.library.register_fake("normquant_tests::rank_order_sum", lambda x, group: torch.empty_like(x))


@torch.library.impl("normquant_tests::rank_order_sum", "CPU")
def _rank_order_sum(x: torch.Tensor, group: str) -> torch.Tensor:
    return reference.sum_of_parts(gather(x, group, "a test"))


def all_reduce(group: dist.ProcessGroup) -> Reduce:
    """As a model has it."""
    return lambda x: funcol.all_reduce(x, "sum", group)


def rank_order_sum(group: dist.ProcessGroup) -> Reduce:
    """The sum that normquant's op computes, as an operation of its own."""
    return lambda x: torch.ops.normquant_tests.rank_order_sum(x, group.group_name)


class Reduced(torch.nn.Module):
    """A linear layer whose output is a part of a sum."""

    def __init__(self, linear: torch.nn.Module, reduce: Reduce) -> None:
        super().__init__()
        self.linear, self.reduce = linear, reduce

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.reduce(self.linear(x))


class Model(torch.nn.Module):
    """Decoder layers and the last norm, this rank's share of them."""

    def __init__(self, rank: int, world: int, reduce: Reduce) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(_layer(i, rank, world, reduce) for i in range(LAYERS))
        self.norm = torch.nn.RMSNorm(TINY.hidden, dtype=torch.bfloat16).requires_grad_(False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, position_embeddings=(cos, sin), attention_mask=mask)
        return self.norm(x)


def inputs(tokens: int = 6) -> tuple[torch.Tensor, ...]:
    return deepseek_layer.inputs(TINY, tokens, "cpu")


def _layer(seed: int, rank: int, world: int, reduce: Reduce) -> torch.nn.Module:
    whole = deepseek_layer._decoder_layer(TINY, "cpu")
    split = replace(TINY, heads=TINY.heads // world, intermediate=TINY.intermediate // world)
    own: Any = deepseek_layer._decoder_layer(split, "cpu")
    generator = torch.Generator().manual_seed(seed)
    shares = dict(own.named_parameters())
    for name, parameter in whole.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        values = 1 + 0.2 * values if parameter.dim() == 1 else values * parameter.shape[1] ** -0.5
        for dim, (size, part) in enumerate(zip(parameter.shape, shares[name].shape, strict=True)):
            if part < size:
                values = values.narrow(dim, rank * part, part)
        shares[name].data.copy_(values)
    own = block_fp8(own)
    own.self_attn.o_proj = Reduced(own.self_attn.o_proj, reduce)
    own.mlp.down_proj = Reduced(own.mlp.down_proj, reduce)
    return own
