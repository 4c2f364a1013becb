"""`normquant bench vllm`: settings of vLLM side by side, each in a process of its own."""
