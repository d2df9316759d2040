"""vLLM: the plugin by which it loads what `save` writes, and the comparison of what it says with Transformers."""
