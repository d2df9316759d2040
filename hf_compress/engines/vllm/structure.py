"""The record of a model's structure as vLLM needs it: parted into what its modules are, and how weights are stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from hf_compress.errors import UnsupportedModelError
from hf_compress.plan.edits import ModuleEdit
from hf_compress.rewrite.config_fields import RECORD_FIELD
from hf_compress.rewrite.edits.attention import NarrowAttention
from hf_compress.rewrite.edits.experts import SplitExperts
from hf_compress.rewrite.edits.ffn import LinearFFN
from hf_compress.rewrite.edits.packed import StoreLinear
from hf_compress.rewrite.edits.sealed import Seal
from hf_compress.rewrite.record import edits_of, entry_of, rebuild_structure, recorded
from hf_compress.storage.limits import check_config

_KEPT = "hf_compress_structure"  # the field of a config that vLLM has read, in which the record is kept


@dataclass(frozen=True)
class Structure:
    """What a record says.

    Attributes:
        edits: of what modules compute, in order.
        stored: of linear maps that are stored in another form than a matrix.
        seals: of modules whose weights go by another name.
    """

    edits: tuple[ModuleEdit, ...]
    stored: tuple[StoreLinear, ...]
    seals: tuple[Seal, ...]

    @staticmethod
    def of(edits: Sequence[ModuleEdit]) -> Structure:
        """Parted; UnsupportedModelError where experts were taken apart."""
        if apart := next((edit for edit in edits if isinstance(edit, SplitExperts)), None):
            raise UnsupportedModelError(
                f"vLLM computes all experts of {apart.paths[-1]} together, and they are stored apart: write them out "
                "first, with hf-compress export DIR --to dense"
            )
        stored = tuple(edit for edit in edits if isinstance(edit, StoreLinear))
        seals = tuple(edit for edit in edits if isinstance(edit, Seal))
        return Structure(tuple(edit for edit in edits if not isinstance(edit, (StoreLinear, Seal))), stored, seals)

    def rebuild(self, model: PreTrainedModel, settings: Any, ranks: int) -> None:
        """Carry out the edits on a model on the meta device, and tell vLLM which blocks have fewer heads.

        Args:
            settings: vLLM's of the model.
            ranks: processes that share each tensor.

        Raises:
            UnsupportedModelError: tensors are shared, and there is a linear FFN: its map goes by the name of one that
                vLLM splits by its inputs.
            PlanError: the record does not fit the model.
        """
        linear = next((edit for edit in self.edits if isinstance(edit, LinearFFN)), None)
        if ranks > 1 and linear is not None:
            raise UnsupportedModelError(
                f"{linear.output}: {linear.describe()}, which vLLM cannot split over {ranks} processes: run it with "
                "tensor_parallel_size=1"
            )
        rebuild_structure(model, self.edits)
        owners = {edit.query.rpartition(".")[0]: edit for edit in self.edits if isinstance(edit, NarrowAttention)}
        if owners:
            settings.model_arch_config = _with_heads(settings.model_arch_config, model, owners)


def structure_of(config: PreTrainedConfig) -> Structure | None:
    """What the record in a config says; None without one.

    It is moved to another field, for vLLM takes what stands in its own for a quantization that it should know.

    Raises:
        PlanError: it is malformed, or of a newer version.
    """
    if not hasattr(config, _KEPT):
        edits = recorded(config)
        if not edits:
            return None
        check_config(config)
        setattr(config, _KEPT, entry_of(edits))
        delattr(config, RECORD_FIELD)
    return Structure.of(edits_of(getattr(config, _KEPT)))


def _with_heads(arch: Any, model: PreTrainedModel, owners: dict[str, NarrowAttention]) -> Any:
    """vLLM's numbers of a model, with those of each block that differ."""
    layers = [dict(values) for values in arch.per_layer_overrides or [{}] * arch.total_num_hidden_layers]
    for path, module in model.named_modules():
        edit = next((edit for name, edit in owners.items() if name == path or name.endswith(f".{path}")), None)
        if edit is not None:
            heads = {"total_num_attention_heads": edit.heads, "total_num_kv_heads": edit.groups}
            layers[int(module.layer_idx)] |= heads  # type: ignore[arg-type]
    return replace(arch, per_layer_overrides=layers)
