"""LRP: what carries no relevance is left out, and what carries more is kept more precisely."""

from hf_compress.methods.lrp.config import LRPConfig

__all__ = ["LRPConfig"]
