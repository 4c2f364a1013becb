"""The documented path of the functions for eager vLLM models; see `normquant.vllm.manual`."""

from normquant.vllm.manual import (
    add_rms_norm_quant,
    block_linear,
    group_quant,
    input_spec,
    rms_norm_quant,
    silu_mul_quant,
)

__all__ = ["add_rms_norm_quant", "block_linear", "group_quant", "input_spec", "rms_norm_quant", "silu_mul_quant"]
