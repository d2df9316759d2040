"""ILLC: fewer hidden units, layer by layer, each layer answering for the errors of those before it."""

from hf_compress.methods.illc.config import ILLCConfig

__all__ = ["ILLCConfig"]
