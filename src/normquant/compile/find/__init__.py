"""Reads a graph and changes nothing: norms, quantizations, and the sites that they make together."""
