"""Stand-ins for vLLM's operations that hold a layer of experts: they find the layer by its name, as vLLM's do."""

from __future__ import annotations

from typing import Any

import torch
from shared.vllm_modules import BlockLinear, K, RoutedExperts
from torch import nn

from normquant.spec import QuantSpec
from normquant.specs import VLLM

LAYERS: dict[str, MoE] = {}
SEEN: list[torch.Tensor] = []  # what the layers were given

_VLLM = torch.library.Library("vllm", "FRAGMENT")
_ARGUMENTS = (
    "Tensor router_logits, Tensor? shared_experts_input, Tensor? input_ids, str layer_name, SymInt hidden_dim_unpadded"
)
_VLLM.define(f"moe_forward(Tensor(a0!) hidden_states, {_ARGUMENTS}) -> Tensor")
_VLLM.define(f"moe_forward_shared(Tensor hidden_states, {_ARGUMENTS}) -> (Tensor, Tensor)")


class MoE(nn.Module):
    """Routed experts, weighted by the mean of the router's logits, and a shared one."""

    def __init__(self, name: str, shared: QuantSpec | None = VLLM) -> None:
        super().__init__()
        self.name = name
        self.routed_experts = RoutedExperts()
        self._shared_experts = None if shared is None else nn.ModuleList([BlockLinear(n=K, seed=4, spec=shared)])
        LAYERS[name] = self

    def forward(self, x: torch.Tensor, router_logits: torch.Tensor) -> torch.Tensor:
        if self._shared_experts is None:
            return torch.ops.vllm.moe_forward(x, router_logits, None, None, self.name, 0)
        shared, routed = torch.ops.vllm.moe_forward_shared(x, router_logits, x, None, self.name, 0)
        return shared + routed

    def routed(self, x: torch.Tensor, router_logits: torch.Tensor) -> torch.Tensor:
        SEEN.append(x)
        weight = router_logits.float().mean(-1, keepdim=True)
        return (self.routed_experts(x).float() * weight).bfloat16()

    def quantized(self) -> dict[str, int]:
        """How often routed and shared experts quantized their own input."""
        own = {"routed": self.routed_experts.prepare.quantized}
        return own | ({"shared": self._shared_experts[0].kernel.quantized} if self._shared_experts else {})


@torch.library.impl(_VLLM, "moe_forward", "CPU")
def _moe(x: Any, router_logits: Any, shared_experts_input: Any, input_ids: Any, name: str, unpadded: int) -> Any:
    out = LAYERS[name].routed(x, router_logits)
    x.zero_()  # as the schema allows
    return out


@torch.library.impl(_VLLM, "moe_forward_shared", "CPU")
def _moe_shared(x: Any, router_logits: Any, shared_experts_input: Any, input_ids: Any, name: str, unpadded: int) -> Any:
    layer = LAYERS[name]
    return layer._shared_experts[0](shared_experts_input), layer.routed(x, router_logits)  # type: ignore[index]


torch.library.register_fake("vllm::moe_forward", lambda x, *args: torch.empty_like(x), lib=_VLLM)
torch.library.register_fake(
    "vllm::moe_forward_shared", lambda x, *args: (torch.empty_like(x), torch.empty_like(x)), lib=_VLLM
)
