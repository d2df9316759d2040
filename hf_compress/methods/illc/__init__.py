"""ILLC: fewer hidden units, layer by layer, each layer answering for the errors of those before it."""

from hf_compress.methods.base.registry import Method, register
from hf_compress.methods.illc.config import ILLCConfig
from hf_compress.methods.illc.plan import plan_narrower
from hf_compress.methods.illc.work import work_of

register(ILLCConfig, Method(plan_narrower, work=work_of))

__all__ = ["ILLCConfig"]
