"""MKA: merging whole residual blocks (arXiv 2406.16330)."""

from hf_compress.methods.base.registry import Method, register
from hf_compress.methods.mka.config import MKAConfig
from hf_compress.methods.mka.plan import plan_merges, single_merges
from hf_compress.methods.mka.work import work_of


def _common(config: MKAConfig) -> tuple[str, ...]:
    """Merges come one after another, so more of them begin as fewer do."""
    return ("estimates", "choice ", "similarity after ")


register(MKAConfig, Method(plan_merges, steps=single_merges, work=work_of, common=_common))

__all__ = ["MKAConfig"]
