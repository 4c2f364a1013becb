"""Triton kernels, one file per op. Nothing here is imported before a CUDA tensor asks for it."""
