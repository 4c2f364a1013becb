"""Models whose linear layers become block-FP8, and the report of those that do not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.utils import parametrize

from normquant.linear.module import LINEAR_SPEC, BlockFP8Linear, refuse_dtensor
from normquant.linear.weights import BLOCK
from normquant.spec import QuantSpec

# What FP8 checkpoints keep in bf16: the output layer, and the routers of experts, where a rounded logit picks another
# expert.
SKIP = ("lm_head", "gate", "*router*", "shared_expert_gate")
WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Modules that hand the weights of their linears to a fused function and never call them.
FUSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


@dataclass(frozen=True)
class ConversionReport:
    """What became of each linear layer of a model, by its first name in the model.

    converted: the layers that are block-FP8. left: name -> why the layer stays as it was.
    """

    converted: tuple[str, ...]
    left: dict[str, str]

    def __str__(self) -> str:
        head = f"{len(self.converted)} linear layers are block-FP8, {len(self.left)} are not"
        return "\n".join([head, *(f"  {name or 'the module itself'}: {reason}" for name, reason in self.left.items())])


def block_fp8(module: nn.Module, spec: QuantSpec = LINEAR_SPEC, *, skip: Sequence[str] = SKIP) -> nn.Module:
    """Replace the linear layers inside `module`, in place, by their block-quantized form; returns `module`.

    A module that is a linear layer itself cannot be replaced in place: its block-quantized form is returned.
    skip: patterns of shell style; a layer stays as it was if one matches its name or the last part of its name.
    `convert_linears` does the same and says what it left, and why.
    """
    return convert_linears(module, spec, skip=skip)[0]


def convert_linears(
    module: nn.Module, spec: QuantSpec = LINEAR_SPEC, *, skip: Sequence[str] = SKIP
) -> tuple[nn.Module, ConversionReport]:
    """As `block_fp8`, with a report of what was converted and what was not.

    Left as they were: layers that `skip` names, that have a forward or hooks of their own, whose K is not a multiple
    of 128, whose weight is tied or of another dtype, and those of nn.MultiheadAttention and nn.TransformerEncoderLayer.
    Raises ValueError for a model that is sharded already.
    """
    for parameter in module.parameters():
        refuse_dtensor(parameter)
    linears = {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear)}
    left = _reasons_to_leave(module, linears, skip)
    made: dict[nn.Module, nn.Module] = {
        child: child if isinstance(child, BlockFP8Linear) else BlockFP8Linear.from_linear(child, spec)
        for name, child in linears.items()
        if name not in left
    }
    for parent in list(module.modules()):
        for name, child in parent._modules.items():  # named_children() gives a module of two names once
            if child in made:
                setattr(parent, name, made[child])
    return made.get(module, module), ConversionReport(tuple(name for name in linears if name not in left), left)


def _reasons_to_leave(module: nn.Module, linears: dict[str, nn.Linear], skip: Sequence[str]) -> dict[str, str]:
    fused = {child: type(m).__name__ for m in module.modules() if isinstance(m, FUSED) for child in m.children()}
    owners = _owners(module)
    reasons = {}
    for name, linear in linears.items():
        others = [owner for owner in owners[id(linear._parameters.get("weight"))] if owner != name]
        reason = _skipped(name, skip) or _own_behaviour(linear) or _wrong_weight(linear)
        if linear in fused:
            reason = f"nn.{fused[linear]} reads its weight without calling it"
        elif others and not reason:
            reason = f"its weight is tied to that of {', '.join(others)}"
        if reason and not isinstance(linear, BlockFP8Linear):
            reasons[name] = reason
    return reasons


def _owners(module: nn.Module) -> dict[int, list[str]]:
    """The names of the modules that hold a parameter, by its id."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, child in module.named_modules():
        for parameter in child._parameters.values():
            owners[id(parameter)].append(name)
    return owners


def _skipped(name: str, skip: Sequence[str]) -> str | None:
    names = name, name.rpartition(".")[2]
    pattern = next((p for p in skip if any(fnmatchcase(n, p) for n in names)), None)
    return None if pattern is None else f"skip has the pattern {pattern!r}"


def _own_behaviour(linear: nn.Linear) -> str | None:
    if type(linear).forward is not nn.Linear.forward or "forward" in vars(linear):
        return f"{type(linear).__name__} has a forward of its own"
    if parametrize.is_parametrized(linear):
        return "its parameters are parametrized"
    if linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks:
        return "it has hooks, which would be lost"
    return None


def _wrong_weight(linear: nn.Linear) -> str | None:
    n, k = linear.weight.shape
    if n == 0 or k == 0 or k % BLOCK:
        return f"its weight is [{n}, {k}]; K must be a positive multiple of {BLOCK}"
    if linear.weight.dtype not in WEIGHT_DTYPES:
        return f"its weight has dtype {linear.weight.dtype}; bfloat16, float16 and float32 are converted"
    return None
