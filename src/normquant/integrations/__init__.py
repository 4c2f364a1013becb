"""Import paths that documentation and installed entry points name; the code is in `normquant.vllm`."""
