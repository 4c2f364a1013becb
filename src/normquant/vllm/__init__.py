"""What touches vLLM, and nothing else: the plugin, its compile pass, its switches and its records."""
