"""AdaptiveCompress: bottlenecks on the residual stream, with tracked importance and a retention schedule."""

from hf_compress.methods.adaptive_compress.config import AdaptiveCompressConfig

__all__ = ["AdaptiveCompressConfig"]
