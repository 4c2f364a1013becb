"""A linear layer on block-quantized activations: its product, its weights, the module, and models made of it."""

from normquant.linear.choice import ProductChoice, choose
from normquant.linear.convert import SKIP, ConversionReport, block_fp8, convert_linears
from normquant.linear.module import LINEAR_SPEC, BlockFP8Linear
from normquant.linear.pairs import GROUP_PAIRS, PAIRS, GroupPair, Pair
from normquant.linear.product import HOPPER, block_fp8_linear, dequantized_linear
from normquant.linear.weights import BLOCK, DequantizedWeight, dequantize_weight, pad_weight_scale, quantize_weight

__all__ = [
    "BLOCK",
    "GROUP_PAIRS",
    "HOPPER",
    "LINEAR_SPEC",
    "PAIRS",
    "SKIP",
    "BlockFP8Linear",
    "ConversionReport",
    "DequantizedWeight",
    "GroupPair",
    "Pair",
    "ProductChoice",
    "block_fp8",
    "block_fp8_linear",
    "choose",
    "convert_linears",
    "dequantize_weight",
    "dequantized_linear",
    "pad_weight_scale",
    "quantize_weight",
]
