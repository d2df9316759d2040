"""LRP: what carries no relevance is left out, and what carries more is kept more precisely."""

from hf_compress.methods.base.registry import Method, register
from hf_compress.methods.lrp.config import LRPConfig
from hf_compress.methods.lrp.plan import plan_by_relevance

register(LRPConfig, Method(plan_by_relevance))

__all__ = ["LRPConfig"]
