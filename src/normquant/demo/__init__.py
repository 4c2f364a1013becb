"""The demonstration: a DeepSeek-R1 layer from transformers, before and after its norms are fused.

The layer is compiled for an H100 with no GPU, stock and with normquant; a small one is run on the CPU, and every fused
op is compared with the graph that it replaced; where there is a CUDA GPU, both compiles are timed.
"""
