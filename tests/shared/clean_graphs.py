"""Graphs that every model has: nothing in the code generated for them is a needless copy."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from normquant.audit import AuditReport, reports
from normquant.audit.capture.live_compile import capture
from normquant.audit.program import GeneratedCode

Graph = tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]
BF16, F16, F32, I64, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.float8_e4m3fn


def empty(*size: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(*size, dtype=dtype, device="cuda")


def rows_of_ones() -> tuple[torch.Tensor, ...]:
    return (empty(64, 512),)


def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def channels_last(*size: int) -> torch.Tensor:
    return torch.empty(*size, dtype=BF16, device="cuda", memory_format=torch.channels_last)


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight


def quantize(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    groups = y.float().view(y.shape[0], -1, 128)
    scale = (groups.abs().amax(-1, keepdim=True) / 448.0).clamp_min(1e-10)
    return (groups / scale).clamp(-448, 448).to(FP8).view(y.shape), scale.squeeze(-1)


def attention_block(x: torch.Tensor, qkv: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """One head: [M, D] -> [M, D]."""
    q, k, v = F.linear(x, qkv).chunk(3, -1)
    return x + F.linear(torch.softmax(q @ k.t() * 0.125, -1) @ v, out)


def attention_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Heads first, as an attention kernel takes and gives them: [H, M, D]."""
    return torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)) * 0.125, -1), v)


def mlp(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return F.linear(F.gelu(F.linear(x, up)), down)


def gated_mlp(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    gate, up = F.linear(x, gate_up).chunk(2, -1)
    return F.linear(F.silu(gate) * up, down)


def rope(q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = q.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def add_norm_quant(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    total = x + residual
    return *quantize(rms_norm(total, weight)), total


def router(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.sigmoid(F.linear(x, weight).float())
    top, index = scores.topk(4, -1)
    return top / top.sum(-1, keepdim=True), index


def kv_cache_update(cache: torch.Tensor, slots: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    cache[slots] = k
    return k * 2


def masked(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask, x, -torch.inf).softmax(-1)


def pair(m: int = 64, n: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    return empty(m, n), empty(m, n)


GRAPHS: dict[str, Graph] = {
    # pointwise
    "add": (lambda x, y: x + y, pair),
    "relu": (lambda x: x.relu(), lambda: (empty(64, 512),)),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), lambda: (empty(64, 512),)),
    "silu_mul": (lambda x: F.silu(x[:, :256]) * x[:, 256:], lambda: (empty(64, 512),)),
    "bias_dropout_add": (lambda b, x, r: r + F.dropout(x + b, 0.1, True), lambda: (empty(512), *pair())),
    "cast_scale": (lambda x: (x.float() * 0.5).to(F16), lambda: (empty(64, 512),)),
    "cast_only": (lambda x: x.to(F32), lambda: (empty(64, 512),)),
    "clamp_to_fp8": (lambda x: x.clamp(-448, 448).to(FP8), lambda: (empty(64, 512),)),
    "transposed_add": (lambda x, y: x.t() + y, lambda: (empty(64, 512), empty(512, 64))),
    "broadcast_mul": (lambda x, s: x * s, lambda: (empty(64, 512), empty(64, 1))),
    "where_softmax": (masked, lambda: (empty(64, 64), empty(64, 64, dtype=torch.bool))),
    "in_place_add": (lambda x, y: x.add_(y).sum(-1), pair),
    "concatenate": (lambda x, y: torch.cat([x, y], -1), pair),
    "pad": (lambda x: F.pad(x, (3, 5)), lambda: (empty(64, 512),)),
    "flip": (lambda x: x.flip(-1), lambda: (empty(64, 512),)),
    "roll": (lambda x: x.roll(3, -1), lambda: (empty(64, 512),)),
    "repeat": (lambda x: x.repeat(2, 1), lambda: (empty(64, 512),)),
    "foreach_mul": (lambda *xs: torch._foreach_mul(list(xs), 2.0), lambda: (empty(64), empty(128), empty(32, 32))),
    # reductions
    "sum_rows": (lambda x: x.sum(-1), lambda: (empty(64, 512),)),
    "sum_columns": (lambda x: x.float().sum(0), lambda: (empty(4096, 1024),)),
    "sum_all": (lambda x: x.sum(), lambda: (empty(4096, 4096),)),
    "variance": (lambda x: torch.var_mean(x.float(), -1), lambda: (empty(64, 512),)),
    "softmax": (lambda x: x.softmax(-1), lambda: (empty(64, 5000),)),
    "log_softmax": (lambda x: x.float().log_softmax(-1), lambda: (empty(64, 5000),)),
    "argmax": (lambda x: x.argmax(-1), lambda: (empty(64, 512),)),
    "cumsum": (lambda x: x.cumsum(-1), lambda: (empty(64, 512),)),
    "sort": (lambda x: x.sort(-1), lambda: (empty(64, 128),)),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (512,), w, b), lambda: (empty(64, 512), empty(512), empty(512))),
    "group_norm": (lambda x, w, b: F.group_norm(x, 4, w, b), lambda: (empty(2, 64, 16, 16), empty(64), empty(64))),
    "rms_norm": (rms_norm, lambda: (empty(64, 7168), empty(7168))),
    "rms_norm_torch": (lambda x, w: F.rms_norm(x, (512,), w), lambda: (empty(64, 512), empty(512))),
    "quantize": (quantize, lambda: (empty(64, 7168),)),
    "add_norm_quant": (add_norm_quant, lambda: (empty(64, 7168), empty(64, 7168), empty(7168))),
    # matrices
    "linear": (lambda x, w, b: F.linear(x, w, b), lambda: (empty(64, 512), empty(256, 512), empty(256))),
    "mlp": (mlp, lambda: (empty(64, 512), empty(2048, 512), empty(512, 2048))),
    "gated_mlp": (gated_mlp, lambda: (empty(64, 512), empty(4096, 512), empty(512, 2048))),
    "attention_block": (attention_block, lambda: (empty(64, 512), empty(1536, 512), empty(512, 512))),
    "attention_heads": (attention_heads, lambda: (empty(8, 64, 64), empty(8, 64, 64), empty(8, 64, 64))),
    "rope": (rope, lambda: (empty(64, 8, 128), empty(64, 1, 64), empty(64, 1, 64))),
    "router": (router, lambda: (empty(64, 512), empty(32, 512))),
    # convolutions
    "convolution": (
        lambda x, w: F.conv2d(x, w, padding=1).relu(),
        lambda: (channels_last(2, 16, 32, 32), channels_last(32, 16, 3, 3)),
    ),
    "max_pool": (lambda x: F.max_pool2d(x, 2), lambda: (empty(2, 16, 32, 32),)),
    "upsample": (lambda x: F.interpolate(x, scale_factor=2), lambda: (empty(2, 16, 32, 32),)),
    # indexing
    "embedding": (lambda i, w: F.embedding(i, w), lambda: (empty(64, dtype=I64), empty(1000, 512))),
    "gather": (lambda x, i: x.gather(-1, i), lambda: (empty(64, 512), empty(64, 8, dtype=I64))),
    "index_add": (lambda t, i, x: t.index_add(0, i, x), lambda: (empty(100, 64), empty(10, dtype=I64), empty(10, 64))),
    "kv_cache_update": (kv_cache_update, lambda: (empty(1000, 512), empty(64, dtype=I64), empty(64, 512))),
}  # fmt: skip


@functools.cache
def compiled(name: str) -> tuple[GeneratedCode, AuditReport]:
    """A graph of the table as Inductor generated it, and its audit; compiled once per test run."""
    (captured,) = capture(*GRAPHS[name])
    return captured, reports.audit_code([captured], "h100")[0]
