"""Weights made up from a seed: of the size that trained ones have, and the same whatever kernels vLLM chooses.

vLLM's own dummy weights are so small, norms among them, that every logit is the same. Here the outputs of each linear
have a variance of about one. Block scales are powers of two, so that DeepGEMM, which asks for such scales and makes
them where there are others, computes with the same weights as Cutlass does.
"""

from __future__ import annotations

import zlib

import torch

from normquant.linear import dequantize_weight, quantize_weight

SCALE = "_scale_inv"  # vLLM's name of a weight's block scales is the weight's own and this
ROUTED = ".routed_experts."
NORM_SPREAD, BIAS_SPREAD = 0.1, 0.05


def fill(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Set every parameter of a vLLM model, before vLLM changes their layouts; returns copies of them on the CPU.

    Names are those of `named_parameters`, without what newer versions put between "experts" and a weight's name; an
    fp8 weight [N, K] or [experts, N, K] has its scales under `SCALE`. Scalars, which are scales of the cache, stay.
    Raises ValueError for a parameter of a dtype or shape that no DeepSeek-V3 has.
    """
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if parameter.dtype == torch.float8_e4m3fn:
            _fill_blocks(name, parameter.data, parameters[name + SCALE].data)
        elif parameter.dim() and not name.endswith(SCALE):
            parameter.data.copy_(_plain(name, parameter))
    return {name.replace(ROUTED, "."): p.data.to("cpu", copy=True) for name, p in parameters.items()}


def float32(weights: dict[str, torch.Tensor], name: str, device: torch.device | str = "cpu") -> torch.Tensor:
    """A weight that `fill` returned, or one expert's, in float32; `name` may end in "[e]" for expert e."""
    name, _, expert = name.partition("[")
    index: int | slice = int(expert[:-1]) if expert else slice(None)
    weight = weights[name][index].to(device)
    if name + SCALE not in weights:
        return weight.float()
    return dequantize_weight(weight, weights[name + SCALE][index].to(device))


def _fill_blocks(name: str, weight: torch.Tensor, scale: torch.Tensor) -> None:
    if weight.dim() == 3:
        for expert in range(weight.shape[0]):  # one at a time: all of them in float32 take gigabytes
            _fill_blocks(f"{name}[{expert}]", weight[expert], scale[expert])
        return
    values = _normal(name, weight) / weight.shape[-1] ** 0.5  # [N, K]
    powers = torch.exp2(torch.ceil(torch.log2(quantize_weight(values)[1])))  # [N/128, K/128]
    weight.copy_(dequantize_weight(values, 1 / powers).to(torch.float8_e4m3fn))
    scale.copy_(powers)


def _plain(name: str, parameter: torch.Tensor) -> torch.Tensor:
    noise = _normal(name, parameter)
    if parameter.dim() == 1:
        return BIAS_SPREAD * noise if name.endswith("bias") else 1 + NORM_SPREAD * noise
    if parameter.dim() != 2 or not parameter.dtype.is_floating_point:
        raise ValueError(f"{name} is {tuple(parameter.shape)} {parameter.dtype}; no weight of a DeepSeek-V3 is")
    return noise if name.endswith("embed_tokens.weight") else noise / parameter.shape[1] ** 0.5


def _normal(name: str, like: torch.Tensor) -> torch.Tensor:
    """Normal float32 numbers of the shape of `like`, by the name."""
    generator = torch.Generator(like.device).manual_seed(zlib.crc32(name.encode()))
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=torch.float32)
