"""Measuring: cases, providers, timing and records. Nothing here formats anything."""
