"""What hf_compress knows of model families, found by structure."""
