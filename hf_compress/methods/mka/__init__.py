"""MKA: merging whole residual blocks (arXiv 2406.16330)."""

from hf_compress.methods.mka.config import MKAConfig

__all__ = ["MKAConfig"]
