"""hf_compress: structural compression for Hugging Face Transformers.

The public names, imported only when they are first used, so that `import hf_compress` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from wrapt import register_post_import_hook

from hf_compress import models

__version__ = "0.1.0"

_PUBLIC = {
    "AdaptiveCompressConfig": "hf_compress.methods.adaptive_compress",
    "Anatomy": "hf_compress.anatomy.anatomy",
    "Bottlenecks": "hf_compress.rewrite.bottlenecks",
    "CalibrationSource": "hf_compress.api.recipe",
    "CardDetails": "hf_compress.report.card_facts",
    "Composite": "hf_compress.attribution.composites",
    "Comparison": "hf_compress.evaluation.comparison",
    "CompressionCallback": "hf_compress.training.callback",
    "CompressionConfig": "hf_compress.methods.base.settings",
    "CompressionReport": "hf_compress.report.report",
    "Compute": "hf_compress.calibration.compute",
    "DataOptions": "hf_compress.calibration.data",
    "DenseConfig": "hf_compress.models.dense_config",
    "DenseForClassification": "hf_compress.models.dense",
    "DistillationConfig": "hf_compress.training.heal_config",
    "DropBlocksConfig": "hf_compress.methods.drop_blocks",
    "Estimate": "hf_compress.api.estimate",
    "EvaluationPlan": "hf_compress.api.recipe",
    "EvaluationResult": "hf_compress.evaluation.evaluate",
    "HealConfig": "hf_compress.training.heal_config",
    "HubError": "hf_compress.errors",
    "ILLCConfig": "hf_compress.methods.illc",
    "LRPConfig": "hf_compress.methods.lrp",
    "Labelled": "hf_compress.evaluation.labelled",
    "LayerCollapseConfig": "hf_compress.methods.layer_collapse",
    "MKAConfig": "hf_compress.methods.mka",
    "ManifestError": "hf_compress.storage.manifest",
    "MemoryBudgetError": "hf_compress.errors",
    "OffloadError": "hf_compress.errors",
    "ProcessesError": "hf_compress.errors",
    "ParityError": "hf_compress.errors",
    "Plan": "hf_compress.plan.plan",
    "PlanError": "hf_compress.errors",
    "Recipe": "hf_compress.api.recipe",
    "Relevance": "hf_compress.attribution.relevance",
    "Rule": "hf_compress.attribution.rules",
    "UnsupportedModelError": "hf_compress.errors",
    "WorkdirError": "hf_compress.errors",
    "analyze": "hf_compress.api.analyze",
    "classify": "hf_compress.evaluation.classification",
    "compare": "hf_compress.evaluation.compare",
    "compress": "hf_compress.api.compress",
    "estimate": "hf_compress.api.estimate",
    "evaluate": "hf_compress.evaluation.evaluate",
    "Exported": "hf_compress.engines.export",
    "export": "hf_compress.engines.export",
    "feature_report": "hf_compress.features.report",
    "fit": "hf_compress.methods.adaptive_compress.fit",
    "heal": "hf_compress.training.heal",
    "heatmap": "hf_compress.report.heatmap",
    "history_of": "hf_compress.report.history",
    "make_plan": "hf_compress.api.compress",
    "model_card": "hf_compress.report.card",
    "perplexity": "hf_compress.evaluation.perplexity",
    "push_to_hub": "hf_compress.storage.hub",
    "register_composite": "hf_compress.attribution.composites",
    "relevance": "hf_compress.attribution.relevance",
    "run": "hf_compress.api.run",
    "save": "hf_compress.storage.save",
    "save_compressed_tensors": "hf_compress.storage.compressed_tensors",
    "SweepResult": "hf_compress.report.sweep_result",
    "sweep": "hf_compress.api.sweep",
    "use_kernels": "hf_compress.modules.kernels",
    "verify_files": "hf_compress.storage.manifest",
}

__all__ = [*_PUBLIC, "__version__", "models"]


# As soon as Transformers is imported, before or after this package, its `from_pretrained` learns to load what `save`
# writes, and our own models. Until then there is nothing to teach, and nothing is imported for it.
register_post_import_hook("hf_compress.storage.loader:register", "transformers.quantizers.auto")
register_post_import_hook("hf_compress.models.dense_config:register", "transformers.models.auto.configuration_auto")
register_post_import_hook("hf_compress.models.dense:register", "transformers.models.auto.modeling_auto")


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hf_compress' has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value  # also puts back a function that a submodule of the same name has just shadowed
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
