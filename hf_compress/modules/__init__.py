"""The modules that a compressed model may contain and that stock Transformers does not have."""
