"""Experts within compiled graphs: what quantizes inside of vLLM's opaque operation takes the norm's quantized form.

The compile pass gives the form to the operation (`compile.fusions.vllm_experts`, `experts_op`), and the readers inside
are replaced here, when the model is loaded. Each of them computes its first input both ways, and takes no form where
that gives other values.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from torch import nn

from normquant.compile.fusions.vllm_experts import MOE, MOE_SHARED
from normquant.spec import QuantSpec
from normquant.vllm.experts_op import define_ops
from normquant.vllm.quantizing_readers import ExpertsReader, Reader, Unreadable, experts, linears
from normquant.vllm.switches import Switches
from normquant.vllm.taking import Taking, is_capturing

log = logging.getLogger("vllm.normquant")

ITSELF = "quantizes its input itself"
_specs: set[QuantSpec] = set()  # of the experts of all models in this process
_reasons: set[str] = set()  # why experts of a model take no form


def experts_spec() -> QuantSpec | str:
    """How the experts of this process's models quantize their input; a reason where there is no one spec."""
    if _reasons:
        return "; ".join(sorted(_reasons))
    if len(_specs) != 1:
        return "its experts are none that are known" if not _specs else "experts quantize by more than one rule"
    return next(iter(_specs))


class CompiledExperts(Taking):
    """The readers within the experts of a model that vLLM compiles."""

    def __init__(self, model: nn.Module, switches: Switches, splitting_ops: Any = ()) -> None:
        super().__init__(switches)
        self._seen: set[str] = set()
        found = list(experts(model))
        if not found:
            return
        apart = sorted({MOE, MOE_SHARED} & set(splitting_ops or ()))
        _reasons.update(f"{name} is a graph of its own" for name in apart)
        _reasons.update(each.reason for each in found if isinstance(each, Unreadable))
        routed = [each for each in found if isinstance(each, ExpertsReader)]
        _specs.update(reader.spec for reader in routed)
        if isinstance(experts_spec(), str):
            return
        define_ops()
        for reader in (*routed, *_shared_linears(model)):
            reader.replace(self.read)

    def read(self, reader: Reader, *args: Any, **kwargs: Any) -> Any:
        """A reader's call; its first one is vLLM's, and shows whether ours is the same."""
        if reader.name not in self._seen:
            return self._first_read(reader, *args, **kwargs)
        return super().read(reader, *args, **kwargs)

    def _first_read(self, reader: Reader, *args: Any, **kwargs: Any) -> Any:
        x = reader.input(*args, **kwargs)
        if x is not None and x.numel() and not is_capturing(x):
            self._seen.add(reader.name)
            self.see(reader, lambda: reader.unlike(*args, **kwargs), ITSELF)
        return reader.stock(*args, **kwargs)


def _shared_linears(model: nn.Module) -> Iterator[Reader]:
    """The linears of shared experts that are within an opaque operation."""
    names = {id(each): name for name, each in model.named_modules()}
    for module in model.modules():
        shared = getattr(module, "_shared_experts", None)
        inside = getattr(shared, "_layer", shared)
        if isinstance(inside, nn.Module):
            for reader in linears(inside):
                if isinstance(reader, Reader):
                    reader.name = names.get(id(reader.layer), reader.name)
                    yield reader
