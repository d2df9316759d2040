"""Measuring models: lm-eval tasks, perplexity, size and speed."""
