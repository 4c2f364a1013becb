"""How the ops run on DTensors: rows may be sharded, K only where every rank has whole groups; the rest is replicated.

    normquant.ops.register_sharding()  # once, before the first call with a DTensor

That is a call of its own because loading DTensor takes longer than all of normquant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from normquant.ops._op import OPS, Op
from normquant.spec import GROUPS

WHOLE_GROUPS = 4 * max(GROUPS)  # K in multiples of it: whole groups of any spec, and whole elements of packed scales
ROWS = ("x", "residual", "z", "positions")  # arguments that have a row for each of the outputs'
ANGLES = ("cos", "sin")

Placements = list[Any]  # one for each output, or for each argument
Rules = Callable[..., list[tuple[Placements, Placements]]]  # arguments of an op -> what it accepts
_others: dict[torch._ops.OpOverload, Rules] = {}
_registered: set[torch._ops.OpOverload] = set()


def register_sharding() -> None:
    """Register with DTensor how the ops run on shards; does nothing where that was done.

    Rows may be sharded; so may K of `group_quant`, in multiples of 512 values a rank, and N and K of
    `block_fp8_linear`, in whole blocks; anything else is gathered first.
    """
    rules = dict(_others)
    for op in OPS.values():
        rules[op.overload] = _rules(op)
        if op.eps_overload:
            rules[getattr(torch.ops.normquant, op.name).tensor] = _rules(op)
    for overload in rules.keys() - _registered:
        _register(overload, rules[overload])
        _registered.add(overload)


def add_rules(overload: torch._ops.OpOverload, rules: Rules) -> None:
    """Have `register_sharding` register an op that is not in `OPS`, too."""
    _others[overload] = rules


def _register(overload: torch._ops.OpOverload, rules: Rules) -> None:
    from torch.distributed.tensor import DTensor, experimental
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo

    experimental.register_sharding(overload)(rules)
    # DTensor caches the outputs' dtypes and strides, by default for the tensors alone; the spec decides them, too
    first = next(i for i, a in enumerate(overload._schema.arguments) if "Tensor" not in str(a.type))
    propagator = DTensor._op_dispatcher.sharding_propagator
    propagator.op_to_schema_info[overload] = RuntimeSchemaInfo(first, needs_pytree=True)


def _rules(op: Op) -> Rules:
    from torch.distributed.tensor import Replicate, Shard

    outputs = len(op.overload._schema.returns)

    def rules(*args: Any) -> list[tuple[Placements, Placements]]:
        given = dict(zip(op.argument_names, args, strict=False))

        def place(names: tuple[str, ...], placement: Any) -> Placements:
            others = [placement if name in names else Replicate() for name in given]
            tensors = [hasattr(value, "placements") for value in given.values()]
            return [one if is_tensor else None for one, is_tensor in zip(others, tensors, strict=True)] + [None]

        accepted: list[tuple[Placements, Placements]] = [([Replicate()] * outputs, place((), None))]
        if _rows_are_independent(given):
            rows = ROWS if given.get("positions") is not None else (*ROWS, *ANGLES)
            accepted.append(([Shard(0)] * outputs, place(rows, Shard(0))))
        if op.name == "group_quant" and given["x"].shape[1] % (WHOLE_GROUPS * given["x"].mesh.size()) == 0:
            accepted.append(([Shard(1)] * outputs, place(("x",), Shard(1))))
        return accepted

    return rules


def _rows_are_independent(given: dict[str, Any]) -> bool:
    """Whether rows can be told apart: without positions, row i of x needs row i of cos and sin, and no further one."""
    if "cos" not in given or given["positions"] is not None:
        return True
    return all(given[name].shape[0] == given["x"].shape[0] for name in ANGLES)
