"""Where the tensors of a forward pass come from: the module that returned them, or the operation that made them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_leaves

from normquant.vllm.module_paths import beside

ALLOCATES = ("aten.empty", "aten.new_empty")  # operations that leave it to others to fill what they return
UNSEEN = "a kernel that torch does not see"


class Origins:
    """Watches a model's modules from `start` to `stop`, and the operations that `note` is told of.

    By storage: one that is freed may be another tensor's next, whose origin is noted then.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        self._made: dict[int, str] = {}
        self._hook: Any = None

    def start(self) -> None:
        """Note what modules return from now on."""
        self._hook = register_module_forward_hook(self._returned)

    def stop(self) -> None:
        self._hook.remove()

    def note(self, operation: object, given: Any, written: Any, result: Any) -> None:
        """An operation ran. given, written, result: trees with the tensors that it got, wrote to and returned."""
        origin = UNSEEN if str(operation).startswith(ALLOCATES) else str(operation)
        self._made.update(dict.fromkeys(_storages(result) - _storages(given) | _storages(written), origin))

    def of(self, x: torch.Tensor, reader: str) -> str:
        """Where a reader's input comes from, in words."""
        storage = x.untyped_storage()
        origin = self._made.get(storage._cdata)
        if origin is None:
            return "its input was there before the forward pass"
        is_part = x.numel() * x.element_size() < storage.nbytes()
        return f"its input is {'a part of ' * is_part}what {beside(reader, origin)} gives"

    def _returned(self, module: nn.Module, inputs: Any, result: Any) -> None:
        if name := self._names.get(module):
            self._made.update(dict.fromkeys(_storages(result) - _storages(inputs), name))


def _storages(tree: Any) -> set[int]:
    tensors = (t for t in tree_leaves(tree) if isinstance(t, torch.Tensor) and torch._C._has_storage(t))
    return {t.untyped_storage()._cdata for t in tensors}  # those of oneDNN have none
