"""The documented path of vLLM's entry point; see `normquant.vllm.plugin`."""

from normquant.vllm.plugin import register

__all__ = ["register"]
