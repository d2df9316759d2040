"""AdaptiveCompress: bottlenecks on the residual stream, with tracked importance and a retention schedule."""

from hf_compress.methods.adaptive_compress.config import AdaptiveCompressConfig
from hf_compress.methods.adaptive_compress.plan import plan_bottlenecks
from hf_compress.methods.adaptive_compress.training import Joint
from hf_compress.methods.adaptive_compress.work import work_of
from hf_compress.methods.base.registry import Method, register

register(AdaptiveCompressConfig, Method(plan_bottlenecks, Joint, work=work_of, dense=False))

__all__ = ["AdaptiveCompressConfig"]
