"""Fuse the norms of a real DeepSeek-V3 layer, and show what changes: the generated code, the values, the time.

A DeepSeek-R1 layer from transformers is compiled for an H100 with no GPU, stock and with normquant; a small one is run
on the CPU, and every fused op is compared with the graph that it replaced; where there is a CUDA GPU both are timed.
"""

from normquant.cli.demo import add_arguments, run

__all__ = ["add_arguments", "run"]
