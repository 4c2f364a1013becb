"""Builds nodes, and cleans up after a rewrite."""
