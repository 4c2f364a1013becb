"""Measures what the kernels and the compile pass choose from, and writes their tables."""
