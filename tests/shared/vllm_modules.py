"""Stand-ins for vLLM's modules outside of compiled graphs: norms, gated products, block-FP8 linears, experts, and a
layer of them.

They have the names, methods and signatures that normquant knows vLLM's by; the arithmetic is vLLM's in plain torch.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from normquant import ops
from normquant.spec import QuantSpec
from normquant.specs import VLLM

K, N = 256, 128


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


class RMSNorm(nn.Module):
    """As vLLM's CUDA norm with a residual: in place. roundings: of the norm, 2 in plain torch and 1 in CUDA."""

    def __init__(self, k: int = K, seed: int = 1, roundings: int = 2) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + values(k, seed=seed) / 8)
        self.variance_epsilon, self.roundings = 1e-6, roundings
        self.variance_size_override, self.has_weight = None, True

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        total = x.float() if residual is None else x.float() + residual.float()
        rounded = total.to(x.dtype)
        total = rounded.float() if self.roundings == 1 else total
        n = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        y = n.to(x.dtype) * self.weight.data if self.roundings == 2 else (n * self.weight.data.float()).to(x.dtype)
        if residual is None:
            return y
        residual.copy_(rounded)
        return x.copy_(y), residual


class GemmaRMSNorm(RMSNorm):
    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        total = x.float() if residual is None else x.float() + residual.float()
        n = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        y = (n * (self.weight.data.float() + 1)).to(x.dtype)
        return y if residual is None else (y, total.to(x.dtype))


for _norm in (RMSNorm, GemmaRMSNorm):
    _norm.__module__ = "vllm.model_executor.layers.layernorm"


class SiluAndMul(nn.Module):
    """roundings: 2 as in CUDA and plain torch, 1 where a compiler generates it."""

    def __init__(self, roundings: int = 2) -> None:
        super().__init__()
        self.roundings = roundings

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.float().chunk(2, dim=-1)
        silu = gate / (1 + torch.exp(-gate))
        return ((silu.to(x.dtype).float() if self.roundings == 2 else silu) * up).to(x.dtype)


SiluAndMul.__module__ = "vllm.model_executor.layers.activation"


class Fp8BlockScaledMMLinearKernel:
    """The kernel's class whose `apply_weights` quantizes and multiplies. quantized: how often it quantized itself."""

    apply_input_quant = True

    def __init__(self, spec: QuantSpec = VLLM) -> None:
        self.spec, self.quantized = spec, 0
        self.config = SimpleNamespace(out_dtype=torch.bfloat16)
        self.quant_fp8 = SimpleNamespace(
            is_group_quant=True,
            static=False,
            group_size=128,
            use_ue8m0=spec.is_ue8m0,
            use_deep_gemm_supported=False,
            column_major_scales=spec.layout != "row",
            tma_aligned_scales=spec.layout == "col_tma",
        )

    def _get_layer_params(self, layer: Any) -> Any:
        return SimpleNamespace(weight=layer.weight, weight_scale_inv=layer.weight_scale_inv, weight_scale=None)

    def apply_weights(self, layer: Any, x: torch.Tensor, bias: Any = None) -> torch.Tensor:
        self.quantized += 1
        form = ops.group_quant(x.reshape(-1, x.shape[-1]), spec=self.spec)
        params = self._get_layer_params(layer)
        out = self.apply_block_scaled_mm(A=form.data, B=params.weight, As=form.scale, Bs=params.weight_scale_inv)
        return (out if bias is None else out + bias).view(*x.shape[:-1], -1)

    def apply_block_scaled_mm(self, A: Any, B: Any, As: Any, Bs: Any) -> torch.Tensor:
        assert As.stride() == self.spec.scale_stride(*A.shape), "the scales lie in another way than the kernel takes"
        x = A.float() * As.repeat_interleave(128, 1)
        return (x @ (B.float() * Bs.repeat_interleave(128, 0).repeat_interleave(128, 1)).t()).bfloat16()


class Kernel(Fp8BlockScaledMMLinearKernel):
    """One of its subclasses."""


class BlockLinear(nn.Module):
    """A linear layer of vLLM: calls its method's kernel with itself."""

    def __init__(self, k: int = K, n: int = N, seed: int = 3, spec: QuantSpec = VLLM) -> None:
        super().__init__()
        self.weight = values(n, k, seed=seed).to(torch.float8_e4m3fn)
        self.weight_scale_inv = torch.full(((n + 127) // 128, k // 128), 0.5)
        self.kernel = Kernel(spec)
        self.quant_method = SimpleNamespace(fp8_linear=self.kernel)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.quant_method.fp8_linear.apply_weights(self, x, None)


class MoEPrepareAndFinalizeNoDPEPModular:
    """quantized: how often it quantized itself."""

    def __init__(self) -> None:
        self.quantized = 0

    def prepare(
        self,
        a1: torch.Tensor,
        topk_weights: Any,
        topk_ids: Any,
        num_experts: int,
        expert_map: Any,
        apply_router_weight_on_input: bool,
        quant_config: Any,
        defer_input_quant: bool = False,
    ) -> Any:
        self.quantized += 1
        form = ops.group_quant(a1, spec=VLLM)
        return form.data, form.scale, None, None, None


class RoutedExperts(nn.Module):
    """One expert for all tokens, to which the first weight of the router belongs."""

    def __init__(self, k: int = K, seed: int = 5) -> None:
        super().__init__()
        self.weight = values(k, k, seed=seed).float()
        config = SimpleNamespace(
            quant_dtype=torch.float8_e4m3fn, block_shape=[128, 128], a1_scale=None, per_act_token_quant=False
        )
        self.config, self.prepare = config, MoEPrepareAndFinalizeNoDPEPModular()
        fused = SimpleNamespace(quant_config=config, expects_unquantized_inputs=False)
        kernel = SimpleNamespace(prepare_finalize=self.prepare, fused_experts=fused)
        self.quant_method = SimpleNamespace(moe_kernel=kernel)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, scale, *_ = self.prepare.prepare(x, None, None, 1, None, False, self.config, defer_input_quant=False)
        return ((q.float() * scale.repeat_interleave(128, 1)) @ self.weight).bfloat16()


class Layer(nn.Module):
    """A norm, a linear that reads it, a norm of a residual sum, and experts and a shared linear that read that, the
    latter with a gated product and a linear behind it.

    between: called with the first norm's result before the linear reads it; gated: with the gated product.
    """

    def __init__(
        self,
        spec: QuantSpec = VLLM,
        shared: QuantSpec = VLLM,
        roundings: int = 2,
        between: Any = None,
        gated: Any = None,
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(roundings=roundings)
        self.qkv_proj = BlockLinear(n=K, spec=spec)
        self.post_attention_layernorm = RMSNorm(seed=2, roundings=roundings)
        self.shared = BlockLinear(n=2 * K, seed=4, spec=shared)
        self.act_fn = SiluAndMul(roundings)
        self.down_proj = BlockLinear(n=K, seed=7, spec=spec)
        self.experts = RoutedExperts()
        self.o_proj = BlockLinear(n=K, seed=6, spec=spec)
        self.between, self.gated = between or (lambda y: None), gated or (lambda y: None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.input_layernorm(x)
        self.between(y)
        attention = self.o_proj(torch.tanh(self.qkv_proj(y)))
        y, x = self.post_attention_layernorm(attention, x.clone())
        y = y.view(-1, y.shape[-1])
        product = self.act_fn(self.shared(y))
        self.gated(product)
        return x + self.down_proj(product) + self.experts(y)


class Model(nn.Module):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"layers": nn.ModuleList([Layer(**kwargs) for _ in range(2)])})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.model["layers"]:
            x = layer(x)
        return x

    def quantized(self) -> dict[str, int]:
        """How often each linear and each layer's experts quantized their own input."""
        own = {name: m.kernel.quantized for name, m in self.named_modules() if isinstance(m, BlockLinear)}
        own |= {name: m.prepare.quantized for name, m in self.named_modules() if isinstance(m, RoutedExperts)}
        return {name.removeprefix("model.layers."): count for name, count in own.items()}
