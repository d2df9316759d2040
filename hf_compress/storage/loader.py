"""Teaches Transformers' `from_pretrained` to rebuild what a saved config records of a model's structure.

Transformers has one place where the modules of a model that is being loaded can be changed before its weights are read:
a quantizer, chosen by `quantization_config` in config.json. This one quantizes nothing by itself. It carries out the
recorded edits on the meta device and is gone when the model is loaded, so that what is left is an ordinary model, which
can be moved, cast, trained and saved.

`import hf_compress` registers it. Imported while Transformers itself is being imported, so the imports at the top are
few.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_compress.errors import PlanError
from hf_compress.plan.plan import METHOD

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@register_quantization_config(METHOD)
class StructureConfig(QuantizationConfigMixin):
    """What config.json keeps under `quantization_config`.

    Args:
        version: of the plan's format.
        plan: edits as JSON values.
    """

    def __init__(self, version: Any = None, plan: Any = None, **unknown: Any) -> None:
        unknown.pop("quant_method", None)
        if unknown:
            raise PlanError(f"the record of this model's structure has unknown fields {sorted(unknown)[:5]}")
        self.quant_method = METHOD  # type: ignore[assignment]
        self.version = version
        self.plan = plan


@register_quantizer(METHOD)
class StructureLoader(HfQuantizer):
    """Changes a model on the meta device into what its record says."""

    quantization_config: StructureConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Read the record before anything is built.

        Raises:
            PlanError: it is malformed, or of a newer version.
        """
        from hf_compress.rewrite.record import edits_of

        self.edits = edits_of(self.quantization_config.to_dict())

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """See the config before a model is built from it; nothing is changed about attention.

        Raises:
            PlanError: it has numbers that no model has.
        """
        from hf_compress.storage.limits import check_config

        check_config(config)
        if config.dtype is None:  # else it would be looked up in the weights, before it is known what files they are in
            config.dtype = torch.get_default_dtype()
        return config

    update_tp_plan = update_attn_implementation  # what sees the config in older versions of Transformers

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        """Rebuild the structure.

        Raises:
            PlanError: the record does not fit the model, or the model its files.
        """
        from hf_compress.rewrite.record import rebuild_structure
        from hf_compress.storage import limits

        limits.check_files(checkpoint_files or (), model.config.name_or_path or "")
        changed = rebuild_structure(model, self.edits)
        if checkpoint_files is not None:  # else the user gives the tensors
            limits.check_size(model, checkpoint_files)
            limits.refuse_missing(model, changed)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Leave the record in the config and nothing else of a quantizer."""
        from transformers import PreTrainedConfig

        from hf_compress.rewrite.record import entry_of
        from hf_compress.storage.limits import check_told
        from hf_compress.storage.portable import forget_shim, is_shim

        check_told(model)
        self.remove_quantization_config(model)
        model.config.quantization_config = entry_of(self.edits)
        for module in model.modules():
            if isinstance(config := getattr(module, "config", None), PreTrainedConfig):
                vars(config).pop("_is_quantized", None)
        if not is_shim(type(model)):
            forget_shim(model.config)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def register(quantizers: Any) -> None:
    """Called when Transformers' table of quantizers is there; importing this module has put the loader into it."""
