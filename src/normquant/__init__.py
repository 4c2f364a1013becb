"""RMSNorm and FP8 block quantization as one kernel, wherever a compiled model has them next to each other.

Public names are imported when asked for. The ops are registered with torch as soon as both are imported, in whichever
order, so that a saved graph that holds them can be loaded.
"""

import importlib
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

from normquant.version import VERSION

if TYPE_CHECKING:
    from normquant import compile, distributed, linear, ops, reference, spec, specs  # noqa: F401
    from normquant.audit import audit  # to a type checker, a module cannot be called
    from normquant.compile import FusionReport, explain, inductor_options
    from normquant.linear import BlockFP8Linear, block_fp8, block_fp8_linear, quantize_weight
    from normquant.ops import warmup
    from normquant.ops.add_rms_norm_quant import add_rms_norm_quant
    from normquant.ops.gated_norm_quant import gated_norm_quant
    from normquant.ops.group_quant import group_quant
    from normquant.ops.latent_norm_quant import latent_norm_quant
    from normquant.ops.rms_norm_quant import rms_norm_quant
    from normquant.ops.silu_mul_quant import silu_mul_quant
    from normquant.spec import QuantizedActivation, QuantSpec

__version__ = VERSION

__all__ = [
    "BlockFP8Linear",
    "FusionReport",
    "QuantSpec",
    "QuantizedActivation",
    "add_rms_norm_quant",
    "audit",
    "block_fp8",
    "block_fp8_linear",
    "explain",
    "gated_norm_quant",
    "group_quant",
    "inductor_options",
    "latent_norm_quant",
    "quantize_weight",
    "rms_norm_quant",
    "silu_mul_quant",
    "specs",
    "warmup",
]
_MODULES = ("audit", "compile", "distributed", "linear", "ops", "reference", "spec", "specs")
_REGISTERING = ("approximate_reciprocal", "kernels", "linear", "ops", "reference", "spec")
_HOME = {  # of the public names that are not functions of `ops`
    **dict.fromkeys(("FusionReport", "explain", "inductor_options"), "compile"),
    **dict.fromkeys(("BlockFP8Linear", "block_fp8", "block_fp8_linear", "quantize_weight"), "linear"),
    **dict.fromkeys(("QuantSpec", "QuantizedActivation"), "spec"),
}


if not TYPE_CHECKING:  # which knows the names from the imports above, and reports all others

    def __getattr__(name: str) -> Any:
        if name not in {*__all__, *_MODULES}:
            raise AttributeError(f"module 'normquant' has no attribute {name!r}")
        if name != "audit":  # which reads generated code without torch
            _require_torch(name)
        if name in _MODULES:
            return importlib.import_module(f"normquant.{name}")
        globals()[name] = found = getattr(importlib.import_module(f"normquant.{_HOME.get(name, 'ops')}"), name)
        return found


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES, *(name for name in globals() if name.startswith("__"))})


def _require_torch(name: str) -> None:
    try:
        importlib.import_module("torch")
    except Exception as error:  # a broken torch raises whatever its loader does
        raise ImportError(f"normquant.{name} needs torch, which cannot be imported: {error}") from error


class _AfterTorch:
    """A finder that finds torch as the others do, and has the ops registered when torch has been imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "torch":
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, found), None)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = partial(self._load, spec.loader.exec_module)  # type: ignore[method-assign]
        return spec

    def _load(self, load: Callable[[ModuleType], None], torch: ModuleType) -> None:
        load(torch)
        sys.meta_path.remove(self)
        # A module that registering imports may be what imports torch; ops and linear register as they are imported.
        if not any(f"normquant.{name}" in sys.modules for name in _REGISTERING):
            _register()


def _register() -> None:
    importlib.import_module("normquant.linear")  # whose product is an op too; imports the others


if sys.modules.get("torch") is not None:
    _register()
else:
    sys.meta_path.insert(0, _AfterTorch())
