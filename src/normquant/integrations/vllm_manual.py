"""The documented path of the functions for eager vLLM models; see `normquant.vllm.manual`."""

from normquant.vllm.manual import *  # noqa: F403  # this path has what that module names in __all__, and nothing else
