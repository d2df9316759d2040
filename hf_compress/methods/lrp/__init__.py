"""LRP: what carries no relevance is left out, and what carries more is kept more precisely."""

from hf_compress.methods.base.registry import Method, register
from hf_compress.methods.lrp.config import LRPConfig, common_results, left_by
from hf_compress.methods.lrp.plan import plan_by_relevance
from hf_compress.methods.lrp.work import work_of

register(LRPConfig, Method(plan_by_relevance, work=work_of, leaves=left_by, common=common_results))

__all__ = ["LRPConfig"]
