"""LayerCollapse: an FFN's two projections made one linear map (arXiv 2311.17943)."""

from hf_compress.methods.base.registry import Method, register
from hf_compress.methods.layer_collapse.config import LayerCollapseConfig
from hf_compress.methods.layer_collapse.plan import plan_collapses, single_collapses, training_schedule
from hf_compress.methods.layer_collapse.work import work_of


def _common(config: LayerCollapseConfig) -> tuple[str, ...]:
    """FFNs are collapsed one after another, so more of them begin as fewer do; unless R² says which may be."""
    return () if config.target_r2 is not None else ("collapse ",)


register(LayerCollapseConfig, Method(plan_collapses, training_schedule, single_collapses, work_of, common=_common))

__all__ = ["LayerCollapseConfig"]
