"""Adapters of PEFT's, on the model or once there: their wrappers stand in the places of the layers."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

_INSIDE = ("base_layer", "original_module")  # what wrappers call the layer itself


def check_no_adapters(model: nn.Module) -> None:
    """Raise where PEFT has wrapped a model or its layers: what is to be changed or saved is not in its place then.

    Raises:
        TypeError: says how to get the model out.
    """
    if not isinstance(model, PreTrainedModel):
        if not _is_peft(model):
            return
        if hasattr(model, "merge_and_unload"):
            raise TypeError("the model is a PeftModel: call model.merge_and_unload() and take what it returns")
        raise TypeError(
            f"the model is a {type(model).__name__} whose learned prompts are no weights of the model and cannot be "
            "merged: take model.get_base_model(), which is the model without them"
        )
    if names := [*(getattr(model, "peft_config", None) or ())]:
        raise TypeError(
            f"the model carries adapters ({', '.join(names)}): take what merge_and_unload() of its PeftModel returns; "
            "where it has none, call merge() on each of PEFT's layers to keep what was learned, and then "
            f"model.delete_adapter({names[0]!r})"
        )
    for path, module in model.named_modules():
        if _is_peft(module):
            inside = next((name for name in _INSIDE if isinstance(getattr(module, name, None), nn.Module)), None)
            remedy = "load the model again"
            if inside is not None:
                loop = f"for path, part in [*model.named_modules()]: hasattr(part, {inside!r}) and "
                remedy = f"put the layers back by `{loop}model.set_submodule(path, part.{inside})`"
            raise TypeError(
                f"{path} is in a wrapper of PEFT's ({type(module).__name__}), which stays when adapters are deleted: "
                f"{remedy}"
            )


def _is_peft(module: nn.Module) -> bool:
    """Told by where its class comes from, so that nothing has to import PEFT for it."""
    return any(kind.__module__.partition(".")[0] == "peft" for kind in type(module).__mro__)
