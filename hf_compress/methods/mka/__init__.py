"""MKA: merging whole residual blocks (arXiv 2406.16330)."""

from hf_compress.methods.base.registry import Method, register
from hf_compress.methods.mka.config import MKAConfig
from hf_compress.methods.mka.plan import plan_merges, single_merges

register(MKAConfig, Method(plan_merges, steps=single_merges))

__all__ = ["MKAConfig"]
