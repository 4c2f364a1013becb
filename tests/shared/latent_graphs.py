"""The latents of multi-head latent attention and their rotations, as models spell them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from shared import vllm_ops
from shared.pass_harness import exact

M, Q, C, R, POSITIONS = 5, 256, 128, 64, 16

Rope = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def products(first: torch.Tensor, second: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple:
    return first * cos - second * sin, second * cos + first * sin


def neighbours(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As vLLM's RotaryEmbedding spells it: the two values of a pair, turned and stacked."""
    turned = products(x[..., ::2], x[..., 1::2], cos.unsqueeze(-2), sin.unsqueeze(-2))
    return torch.stack(turned, dim=-1).flatten(-2)


def halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat(products(first, second, cos.unsqueeze(-2), sin.unsqueeze(-2)), dim=-1)


def repeated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As vLLM's DeepseekScalingRotaryEmbedding spells it: whole rows, with the angles repeated and x rearranged."""
    cos, sin = (angle.repeat_interleave(2, dim=-1).unsqueeze(-2) for angle in (cos, sin))
    rearranged = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return (x * cos + rearranged * sin).to(x.dtype)


def repeated_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    cos, sin = (torch.cat((angle, angle), dim=-1).unsqueeze(-2) for angle in (cos, sin))
    first, second = x[..., : R // 2], x[..., R // 2 :]
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def to_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As transformers' DeepSeek spells it: pairs of neighbours are read, halves are written."""
    grouped = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    return repeated_halves(grouped, cos, sin)


def in_float32(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return neighbours(x.float(), cos.float(), sin.float()).to(x.dtype)


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    return torch.ops.vllm_ir.rms_norm(x, weight, eps)


def decomposed(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def latents(
    rope: Rope = neighbours, norms: tuple[Any, Any] = (norm, norm), quantize: Any = None, **quant: Any
) -> Callable[..., tuple[torch.Tensor, ...]]:
    """vLLM's MLA layer up to the attention: q_b_proj is a product with ones, the rotation of q_pe comes after it."""

    def fn(x, q_weight, kv_weight, cache, positions):
        q_a, kv = x.split([Q, C + R], dim=-1)
        data, scale = (quantize or vllm_ops.per_token_group_fp8_quant)(norms[0](q_a, q_weight), **quant)
        kv_a, k_pe = kv.split([C, R], dim=-1)
        kv_norm = norms[1](kv_a, kv_weight)
        q = torch.mm(data.to(x.dtype), torch.ones(Q, 2 * R, dtype=x.dtype)).view(-1, 2, R)
        cos, sin = cache[positions].chunk(2, dim=-1)
        return data, scale, kv_norm, rope(k_pe.unsqueeze(1), cos, sin), rope(q, cos, sin)

    return fn


def in_columns(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A quantization in aten operations whose scales are returned as [G, M]."""
    grouped = y.float().unflatten(-1, (-1, 128))
    scale = grouped.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0
    return (grouped / scale).clamp(-448.0, 448.0).flatten(-2).to(torch.float8_e4m3fn), scale.squeeze(-1).t()


def inputs(m: int = M, dtype: torch.dtype = torch.bfloat16, cache: torch.dtype | None = None) -> tuple:
    """Inputs whose sums of squares are exact in fp32, so that the order of the sum is not what is compared."""
    generator = torch.Generator().manual_seed(7)
    angles = torch.randn(POSITIONS, R, generator=generator).to(cache or dtype)
    positions = torch.randint(0, POSITIONS, (m,), generator=generator)
    weights = exact(Q, dtype=dtype, seed=1) + 0.5, exact(C, dtype=dtype, seed=2) + 0.5
    return exact(m, Q + C + R, dtype=dtype), *weights, angles, positions


def another_eps(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return norm(x, weight, 1e-5)


def once(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * weight.float()).to(x.dtype)


def opaque(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    turned = x.clone()
    torch.ops._C.rotary_embedding(turned, torch.cat((cos, sin), -1))
    return turned


def wrong_sign(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return neighbours(x, cos, -sin)


def gemma(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + weight.float())).to(x.dtype)


def a_part(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return torch.cat((neighbours(x[..., : R // 2], cos[..., ::2], sin[..., ::2]), x[..., R // 2 :]), dim=-1)


def into_the_cache(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return torch.ops.vllm.unified_mla_kv_cache_update(neighbours(x, cos, sin).squeeze(1))


def swapped(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return neighbours(x, sin, cos)


def other_rows(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return neighbours(x, cos.flip(0), sin.flip(0))


_C = torch.library.Library("_C", "FRAGMENT")


@torch.library.impl(_C, "rotary_embedding", "CPU")
def _rotary_embedding(key: torch.Tensor, angles: torch.Tensor) -> None:
    key.copy_(neighbours(key, *angles.chunk(2, dim=-1)))


_VLLM = torch.library.Library("vllm", "FRAGMENT")
