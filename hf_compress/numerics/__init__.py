"""Numerics of the methods: tensors in, tensors out, no Transformers."""
