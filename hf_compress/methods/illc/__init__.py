"""ILLC: fewer hidden units, layer by layer, each layer answering for the errors of those before it."""

from hf_compress.methods.base.registry import Method, register
from hf_compress.methods.illc.config import ILLCConfig
from hf_compress.methods.illc.plan import plan_narrower

register(ILLCConfig, Method(plan_narrower))

__all__ = ["ILLCConfig"]
