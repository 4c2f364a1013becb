"""The ops, each in a file of its own: importing this registers them with torch.

The functions take any leading dimensions. `OPS` has every op by its name in `torch.ops.normquant`.
"""

from normquant.ops import rope_last as rope_last  # the compile pass alone calls it, through torch
from normquant.ops._examples import Examples
from normquant.ops._op import LIBRARY, OPS, Op, warmup
from normquant.ops._sharding import register_sharding
from normquant.ops.add_rms_norm_quant import add_rms_norm_quant
from normquant.ops.all_reduce_add_rms_norm_quant import all_reduce_add_rms_norm, all_reduce_add_rms_norm_quant
from normquant.ops.gated_norm_quant import gated_norm_quant
from normquant.ops.group_quant import group_quant
from normquant.ops.latent_norm_quant import latent_norm_quant
from normquant.ops.rms_norm_quant import rms_norm_quant
from normquant.ops.silu_mul_quant import silu_mul_quant

__all__ = [
    "LIBRARY",
    "OPS",
    "Examples",
    "Op",
    "add_rms_norm_quant",
    "all_reduce_add_rms_norm",
    "all_reduce_add_rms_norm_quant",
    "gated_norm_quant",
    "group_quant",
    "latent_norm_quant",
    "register_sharding",
    "rms_norm_quant",
    "silu_mul_quant",
    "warmup",
]
