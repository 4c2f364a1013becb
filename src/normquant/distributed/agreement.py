"""Before the first call: whether all ranks would do the same."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

import torch
import torch.distributed as dist


def check_agreement(
    group: dist.ProcessGroup, x: torch.Tensor, weights: Sequence[torch.Tensor] = (), **settings: object
) -> None:
    """Raise ValueError, on every rank, naming a rank whose x has another shape or dtype, or whose weights or settings
    differ from those of rank 0. Every rank calls this, at warm-up: it waits for all."""
    own = {
        "rows": x.shape[0],
        "K": x.shape[1],
        "dtype": str(x.dtype).removeprefix("torch."),
        **{f"weight {i}": _digest(weight) for i, weight in enumerate(weights)},
        **{name: str(value) for name, value in settings.items()},
    }
    ranks: list[dict[str, object]] = [{} for _ in range(group.size())]
    dist.all_gather_object(ranks, own, group=group)
    for rank, other in enumerate(ranks):
        for name in ranks[0] | other:
            if ranks[0].get(name) != other.get(name):
                raise ValueError(
                    f"rank {rank} of group {group.group_name!r} has {name} {other.get(name)} and rank 0 "
                    f"{ranks[0].get(name)}; both must be the same"
                )


def _digest(weight: torch.Tensor) -> str:
    return sha256(weight.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
