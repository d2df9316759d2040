"""LayerCollapse: an FFN's two projections made one linear map (arXiv 2311.17943)."""

from hf_compress.methods.layer_collapse.config import LayerCollapseConfig

__all__ = ["LayerCollapseConfig"]
