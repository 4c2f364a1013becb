"""What of vLLM's groups the fusion of all-reduces has to know: their names, and who else fuses in front of a norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Graph

from normquant.compile.find.reduced_norms import norms_of_sums
from normquant.compile.fusions import norm_quant
from normquant.compile.fusions.all_reduce_norm_quant import AllReduceNormQuant
from normquant.compile.fusions.candidate import Findings

OFF = "off by default, as it adds the ranks' parts in another order; NORMQUANT_ALL_REDUCE=1 fuses it"
ALL_REDUCE_FUSIONS = ("AllReduceFusionPass", "RocmAiterAllReduceFusionPass")
LEFT = "left to vLLM's fusion of all-reduce and norm"


def torch_name(vllm_name: str) -> str:
    """torch's name of the group that vLLM's graphs call "tp:0" or alike. Raises ValueError where there is none."""
    from vllm.distributed import parallel_state

    found = getattr(parallel_state, "_groups", {}).get(vllm_name)
    coordinator = None if found is None else found()  # a weak reference
    group = getattr(coordinator, "device_group", None)
    if group is None:
        raise ValueError(f"vLLM has no group {vllm_name!r} with a process group here")
    name: str = group.group_name
    return name


def all_reduce_fusion(enabled: bool) -> AllReduceNormQuant:
    """The fusion for vLLM's graphs. vLLM hashes what its groups are, so that they are no part of the pass's key."""
    return AllReduceNormQuant(torch_name, "" if enabled else OFF, groups=tuple)


@dataclass(frozen=True)
class NormQuantBesideVllm:
    """`norm_quant`, which leaves the norms of all-reduces where a pass of vLLM's is going to fuse these two."""

    fuses_later: Callable[[], bool] = field(default=bool, repr=False, compare=False)

    def __call__(self, graph: Graph) -> Findings:
        yield from norm_quant.find(graph, norms_of_sums(graph) if self.fuses_later() else (), LEFT)


def fuses_all_reduces(passes: Sequence[Any], compile_range: Any) -> bool:
    """Whether one of vLLM's passes fuses all-reduces with norms in a graph for so many tokens."""
    fusing = (entry for entry in passes if type(entry).__name__ in ALL_REDUCE_FUSIONS)
    return any(entry.is_applicable_for_range(compile_range) for entry in fusing)
