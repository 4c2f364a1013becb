"""`normquant bench vllm`: settings of vLLM beside each other, each in a process of its own."""
