"""Compression in a `transformers.Trainer`: before, during, and after the training."""
