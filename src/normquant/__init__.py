"""RMSNorm and FP8 block quantization as one kernel, wherever a compiled model has them next to each other."""

from typing import TYPE_CHECKING

from normquant.version import VERSION

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
    "group_quant",
    "inductor_options",
    "latent_norm_quant",
    "quantize_weight",
    "rms_norm_quant",
    "silu_mul_quant",
    "specs",
    "warmup",
]

try:
    import torch as _torch  # noqa: F401
except Exception as _error:  # `normquant env` must say what is wrong with torch, not fail on it
    _reason = _error

    def __getattr__(name: str) -> object:
        if name in __all__:
            raise ImportError(f"normquant.{name} needs torch, which cannot be imported: {_reason}") from _reason
        raise AttributeError(f"module 'normquant' has no attribute {name!r}")

else:
    from normquant import specs
    from normquant.compile import FusionReport, explain, inductor_options
    from normquant.linear import BlockFP8Linear, block_fp8, block_fp8_linear, quantize_weight
    from normquant.ops import (
        add_rms_norm_quant,
        group_quant,
        latent_norm_quant,
        rms_norm_quant,
        silu_mul_quant,
        warmup,
    )
    from normquant.spec import QuantizedActivation, QuantSpec

    if TYPE_CHECKING:  # to a type checker, a module cannot be called
        from normquant.audit import audit
    else:
        from normquant import audit  # the package, which can
